"""The shape of a transformer, found without a list of models: stacks of blocks, linears, embeddings, head."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Structure:
    """What of a model can be quantized and in which order it runs.

    Attributes:
        blocks: module names of the repeated blocks, stack after stack.
        linears: names of linears inside each block, keyed by the block.
        outer_linears: names of linears outside every block (the output head).
        embeddings: names of token embeddings outside every block.
        tied: outer linear → the embedding whose weight it shares.
        others: modules inside blocks that own a weight matrix but are no linear (Conv1D, fused experts, routers).
    """

    blocks: list[str]
    linears: dict[str, list[str]]
    outer_linears: list[str]
    embeddings: list[str]
    tied: dict[str, str]
    others: list[str] = field(default_factory=list)

    def names(self) -> list[str]:
        """Return the name of every module a recipe can target."""
        return [*self.embeddings, *(n for names in self.linears.values() for n in names), *self.outer_linears]


def find_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the outermost module lists whose members are alike and hold weight matrices, by name, in order."""
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
    blocks = [f"{name}.{i}" for name, stack in find_stacks(model).items() for i in range(len(stack))]
    linears: dict[str, list[str]] = {b: [] for b in blocks}
    outer: list[str] = []
    embeddings: list[str] = []
    others: list[str] = []
    for name, module in model.named_modules():
        owner = next((b for b in blocks if name.startswith(f"{b}.")), None)
        if isinstance(module, nn.Linear):
            (linears[owner] if owner else outer).append(name)
        elif isinstance(module, nn.Embedding):
            if owner is None and _is_table(module):
                embeddings.append(name)
        elif owner and any(p is not None and p.dim() > 1 for p in module._parameters.values()):
            others.append(name)
    return Structure(blocks, linears, outer, embeddings, _tied(model, outer, embeddings), others)


def _is_block(module: nn.Module) -> bool:
    """Return whether ``module`` is made of others that hold weight matrices."""
    inner = (p for m in module.modules() if m is not module for p in m._parameters.values())
    return any(p is not None and p.dim() > 1 for p in inner)


def _is_table(module: nn.Embedding) -> bool:
    """Return whether ``module`` looks rows up by their ids, at most times a constant: not a position table with rules of its own."""
    return type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")


def embedding_multiplier(module: nn.Module) -> float:
    """Return the constant that an embedding's rows are multiplied by."""
    scale = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", 1.0))
    return float(scale)


def _tied(model: nn.Module, outer: list[str], embeddings: list[str]) -> dict[str, str]:
    """Return the heads that share an embedding's weight: the same parameter, or declared so by the model."""
    pairs = {}
    shares = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    declared = getattr(model, "_tied_weights_keys", None) or {}
    for head in outer:
        weight = model.get_submodule(head).weight
        for name in embeddings:
            table = model.get_submodule(name).weight
            says = shares and isinstance(declared, dict) and declared.get(f"{head}.weight") == f"{name}.weight"
            if weight is table or says:
                pairs[head] = name
    return pairs


def weight_shapes(model: nn.Module, structure: Structure) -> dict[str, tuple[int, int]]:
    """Return the (rows, columns) of every module a recipe can target."""
    shapes = {}
    for name in structure.names():
        rows, columns = model.get_submodule(name).weight.shape  # type: ignore[misc]
        shapes[name] = (int(rows), int(columns))
    return shapes


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place called ``name``."""
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = module
