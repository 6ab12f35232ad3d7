"""The shape of a transformer, found without a list of models: stacks of blocks, linears, embeddings, head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from llm_fp4.nn import ExpertList, is_linear, linear_shape

CONVOLUTION = "a convolution, which reads patches instead of tokens"
TABLE = "a small table of positions or types, which every sequence reads"
PARAMETER = "a table its block adds or gathers, not a layer"
ROUTER = "a router: a few outputs decide which experts run"


@dataclass(frozen=True)
class Structure:
    """What of a model can be quantized and in which order it runs.

    Attributes:
        stacks: module names of the repeated blocks, by the list that holds them (encoder, decoder, vision tower).
        linears: names of linears inside each block, keyed by the block.
        outer_linears: names of linears outside every block (patch projections, poolers, heads).
        embeddings: names of token embeddings outside every block.
        tied: outer linear → the embedding whose weight it shares.
        aliases: embedding → the embedding whose weight it shares (an encoder's and a decoder's).
        floats: modules with a weight of two or more axes that stay in float, and why.
        others: modules inside blocks that own a weight matrix of a kind that is not known (fused experts).
    """

    stacks: dict[str, list[str]]
    linears: dict[str, list[str]]
    outer_linears: list[str]
    embeddings: list[str]
    tied: dict[str, str]
    aliases: dict[str, str] = field(default_factory=dict)
    floats: dict[str, str] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    @property
    def blocks(self) -> list[str]:
        """Module names of all blocks, stack after stack in the order of the model's modules."""
        return [block for blocks in self.stacks.values() for block in blocks]

    def names(self) -> list[str]:
        """Return the name of every module a recipe can target."""
        return [*self.embeddings, *self.aliases, *(n for names in self.linears.values() for n in names), *self.outer_linears]


def find_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the outermost module lists whose members are alike and hold linear layers, by name, in order."""
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in stacks)
        if not isinstance(module, nn.ModuleList) or inside or len(module) == 0:
            continue
        alike = len({type(m) for m in module}) == 1
        if alike and all(_is_block(block) for block in module):
            stacks[name] = module
    return stacks


def find_structure(model: nn.Module) -> Structure:
    """Return the structure of ``model``, which may lie on the meta device."""
    stacks = {name: [f"{name}.{i}" for i in range(len(stack))] for name, stack in find_stacks(model).items()}
    blocks = [block for names in stacks.values() for block in names]
    linears: dict[str, list[str]] = {b: [] for b in blocks}
    outer: list[str] = []
    embeddings: list[str] = []
    floats: dict[str, str] = {}
    others: list[str] = []
    vocabularies = set(_vocabularies(model))
    for name, module in model.named_modules():
        owner = next((b for b in blocks if name.startswith(f"{b}.")), None)
        if is_linear(module):
            (linears[owner] if owner else outer).append(name)
        elif isinstance(module, nn.Embedding):
            if owner is None and _is_table(module) and (not vocabularies or module.num_embeddings in vocabularies):
                embeddings.append(name)
            else:
                floats[name] = TABLE
        elif any(p is not None and p.dim() > 1 for p in module._parameters.values()):
            reason = _why_float(model, name, module)
            if reason:
                floats[name] = reason
            elif owner:
                others.append(name)
    aliases = _tied(model, embeddings, embeddings)
    embeddings = [n for n in embeddings if n not in aliases]
    return Structure(stacks, linears, outer, embeddings, _tied(model, outer, embeddings), aliases, floats, others)


def _is_block(module: nn.Module) -> bool:
    """Return whether ``module`` is made of others among which are linear layers."""
    return any(is_linear(m) for m in module.modules() if m is not module)


def _why_float(model: nn.Module, name: str, module: nn.Module) -> str:
    """Return why a module with weights that is neither a linear nor an embedding stays in float; empty where nothing is known."""
    if isinstance(module, nn.modules.conv._ConvNd) or type(module).__name__ == "ParametrizationList":
        return CONVOLUTION
    wide = {n: p for n, p in module._parameters.items() if p is not None and p.dim() > 1}
    if all((n != "weight" and p.dim() == 2) or 1 in p.shape for n, p in wide.items()):
        return PARAMETER
    siblings = list(model.get_submodule(name.rpartition(".")[0]).children())
    experts = {len(p) for m in siblings for p in m._parameters.values() if p is not None and p.dim() == 3}
    experts |= {len(child) for m in siblings for child in m.children() if isinstance(child, ExpertList)}
    if set(wide) == {"weight"} and len(wide["weight"]) in experts:
        return ROUTER
    return ""


def _vocabularies(model: nn.Module) -> Iterator[int]:
    """Yield the vocabulary sizes that the model's configuration and those nested in it state."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        yield from _sizes(config.to_dict())


def _sizes(config: Mapping[str, Any]) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _sizes(value)
        elif str(name).endswith("vocab_size") and not str(name).startswith("type") and isinstance(value, int):
            yield value


def _is_table(module: nn.Embedding) -> bool:
    """Return whether ``module`` looks rows up by their ids, at most times a constant: not a position table with rules of its own."""
    return type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")


def embedding_multiplier(module: nn.Module) -> float:
    """Return the constant that an embedding's rows are multiplied by."""
    scale = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", 1.0))
    return float(scale)


def _tied(model: nn.Module, names: list[str], embeddings: list[str]) -> dict[str, str]:
    """Return those of ``names`` that share the weight of an embedding that comes first: the same parameter, or declared so."""
    pairs: dict[str, str] = {}
    shares = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    declared = getattr(model, "_tied_weights_keys", None) or {}
    for name in names:
        weight = model.get_submodule(name).weight
        for owner in embeddings:
            if owner == name:
                break  # an embedding shares with those before it only
            if owner in pairs:
                continue
            says = shares and isinstance(declared, dict) and declared.get(f"{name}.weight") == f"{owner}.weight"
            if weight is model.get_submodule(owner).weight or says:
                pairs[name] = owner
                break
    return pairs


def weight_shapes(model: nn.Module, structure: Structure) -> dict[str, tuple[int, int]]:
    """Return the (rows, columns) of every module a recipe can target: (out, in) of a linear."""
    return {name: linear_shape(model.get_submodule(name)) for name in structure.names()}


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place called ``name``."""
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = module


@contextmanager
def placed(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Let ``modules`` stand in the places they are named by while the block holds."""
    before = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            set_module(model, name, module)
        yield
    finally:
        for name, module in before.items():
            set_module(model, name, module)
