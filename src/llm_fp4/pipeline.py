"""The one loop: collect, search, quantize, replace and propagate, block by block."""

from __future__ import annotations

import gc
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llm_fp4.calibration import collect, shared_inputs
from llm_fp4.checkpoint import STORED, RunStore
from llm_fp4.errors import RecipeError, UnsupportedError
from llm_fp4.models import Batch, BlockRunner, Structure, WeightSource, embedding_multiplier, set_module, weight_shapes
from llm_fp4.nn import QuantEmbedding, QuantLinear
from llm_fp4.numerics import PerRow, QuantizedTensor, parse, quantize_tensor, require_finite
from llm_fp4.plan import FixedWeight, SiteResult, WeightPlan
from llm_fp4.progress import Progress, silent
from llm_fp4.recipe import Recipe
from llm_fp4.search import embedding_plan, search_site
from llm_fp4.statistics import SiteStatistics
from llm_fp4.storage import write_tensors

Runs = list[tuple[Callable[[], object], Tensor | None]]
Decided = tuple[dict[str, Tensor], dict[str, nn.Module], SiteResult]  # weights, modules and plan of a site


class _ZeroEmbedding(nn.Module):
    """Stands for an embedding once its rows have been looked up: later units take hidden states from storage."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, self.dim, device=ids.device)


def shared_heads(structure: Structure, recipe: Recipe) -> dict[str, str]:
    """Return head → embedding of the tied pairs that stay one stored tensor: both quantized, with the same candidate formats."""
    shared = {}
    for head, embedding in structure.tied.items():
        formats = recipe.embedding_formats() if recipe.selects(head) and recipe.selects(embedding) else ()
        rule = recipe.rule(head, head=True) if formats else None
        if rule and rule.weight_formats == formats and rule.weight_blocks is None:  # embeddings have a scale a row
            shared[head] = embedding
    return shared


@dataclass
class Job:
    """One quantization run over a model whose blocks are loaded one at a time.

    Attributes:
        batches: keyword arguments of the model; "attention_mask" (batch, tokens) marks padding.
        keep: leave every quantized module in the model (an in-memory run); otherwise blocks return to the meta device.
    """

    model: nn.Module
    structure: Structure
    source: WeightSource
    recipe: Recipe
    batches: list[Batch]
    store: RunStore
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    progress: Progress = silent
    keep: bool = False

    def __post_init__(self) -> None:
        self.runner = BlockRunner(self.model, self.structure.blocks)
        self.runner.tuples = self.store.tuples
        self.shapes = weight_shapes(self.model, self.structure)
        self.sequential = self.recipe.search.propagation == "sequential"
        self.shared_head = shared_heads(self.structure, self.recipe)

    def run(self) -> None:
        """Quantize everything the recipe selects; every finished unit is in the store at once."""
        units = self.store.units
        self.progress("quantize", self.store.done, units)
        for unit in range(self.store.done, units):
            if unit == 0:
                self._embeddings()
            elif unit < units - 1:
                self._block(unit)
            else:
                self._tail(unit)
            gc.collect()  # modules and hooks refer to each other: a block's weights would wait for some later collection
            self.progress("quantize", unit + 1, units)

    # --- the units ----------------------------------------------------------------------------------

    def _embeddings(self) -> None:
        """Unit 0: quantize the embeddings and store the input of the first block."""
        names = [n for n in self.structure.embeddings if self.recipe.selects(n) and self.recipe.embedding_formats()]
        self._load_outer(list(self.structure.tied))
        self._refuse_early_linears()
        tensors: dict[str, Tensor] = {}
        plans: dict[str, Any] = {}
        replaced: dict[str, nn.Module] = {}
        for name in self.structure.embeddings:
            table = self.model.get_submodule(name)
            if name not in names:
                tensors |= self._tensors(table, name)
                continue
            weight = cast(Tensor, table.weight).detach().float()
            require_finite(weight, f"the weight of {name}")
            head = next((h for h, e in self.shared_head.items() if e == name), None)
            searched = self.recipe.search if self.recipe.method.startswith("fpq") else None
            gram = self._float_head_gram(head) if head and searched else None
            plan, rounded = embedding_plan(name, weight, self.recipe.embedding_formats(), searched, gram)
            quantized = quantize_tensor(rounded, plan.scale, plan.format, PerRow(), name)
            multiplier = embedding_multiplier(table)
            replaced[name] = QuantEmbedding.from_quantized(quantized, torch.float32, multiplier)
            tensors |= {f"{name}.weight_packed": quantized.packed, f"{name}.weight_scale": quantized.scale}
            plans[name] = {"kind": "embedding", "multiplier": multiplier, **plan.to_json()}
        if self.sequential:
            for name, module in replaced.items():
                set_module(self.model, name, module)
        for i, batch in enumerate(self.batches):
            self.store.save_input(1, i, self.runner.first_hidden(batch))
        for name, module in replaced.items():
            set_module(self.model, name, module)
        self.store.tuples = self.runner.tuples
        self.store.finish(0, tensors, {"weights": plans, "inputs": {}})

    def _block(self, unit: int) -> None:
        """One block: its sites in the order they run, each collected after those before it were quantized."""
        self._empty_embeddings()
        name = self.structure.blocks[unit - 1]
        block = self.source.load(self.model, name, self.device)

        def run(i: int) -> Tensor:
            return self.runner.run(unit - 1, block, self.batches[i], self.store.input(unit, i).to(self.device))

        selected = {n: self.model.get_submodule(n) for n in self.structure.linears[name] if self.recipe.selects(n)}
        selected = {n: m for n, m in selected.items() if self.recipe.rule(n).weight_formats or self.recipe.rule(n).input_formats}
        plans: dict[str, Any] = {"weights": {}, "inputs": {}}
        if not self.sequential:
            for i in range(len(self.batches)):
                self.store.save_input(unit + 1, i, run(i))
        decided = []
        for group in self._sites(shared_inputs(selected, lambda: run(0)), selected):
            decided.append(self._site(group, selected, self._runs(run), plans))
            if self.sequential:  # otherwise every site of the block reads what it reads in the float model
                self._replace(*decided.pop())
        for site in decided:
            self._replace(*site)
        if self.sequential:
            for i in range(len(self.batches)):
                self.store.save_input(unit + 1, i, run(i))
        tensors = self._tensors(block, name)
        self.store.tuples = self.runner.tuples
        self.store.finish(unit, tensors, plans)
        if not self.keep:
            self.source.release(self.model, name)

    def _tail(self, unit: int) -> None:
        """The last unit: linears outside the blocks, the output head among them."""
        self._empty_embeddings()
        self._load_outer([])
        selected = {n: self.model.get_submodule(n) for n in self.structure.outer_linears if self.recipe.selects(n)}
        selected = {n: m for n, m in selected.items() if self.recipe.rule(n, head=True).weight_formats}
        plans: dict[str, Any] = {"weights": {}, "inputs": {}}

        def run(i: int) -> object:
            return self.runner.tail(self.batches[i], self.store.input(unit, i).to(self.device))

        for group in self._sites(shared_inputs(selected, lambda: run(0)), selected, head=True):
            self._replace(*self._site(group, selected, self._runs(run), plans, head=True))
        tensors = self._tensors(self.model, "")
        apart = (*self.structure.blocks, *self.structure.embeddings)
        shared = {f"{h}.{t}" for h in self.shared_head for t in ("weight_packed", "weight_scale")}
        # a float head tied to a float embedding is that embedding's tensor
        shared |= {f"{h}.weight" for h, e in self.structure.tied.items() if e not in self._quantized_embeddings()}
        tensors = {n: t for n, t in tensors.items() if n not in shared and not n.startswith(tuple(f"{m}." for m in apart))}
        self.store.finish(unit, tensors, plans)

    # --- one site -----------------------------------------------------------------------------------

    def _sites(self, groups: list[list[str]], selected: dict[str, nn.Module], head: bool = False) -> list[list[str]]:
        """Return groups split where operands of one tensor ask for different inputs.

        Raises:
            UnsupportedError: a selected linear did not run, so that nothing is known of its input.
        """
        ran = {n for g in groups for n in g}
        if twice := [n for n in ran if sum(n in g for g in groups) > 1]:
            raise UnsupportedError(
                f"{twice[0]} runs on several inputs in one pass, which is not implemented; add --ignore {twice[0]}"
            )
        if idle := sorted(set(selected) - ran):
            raise UnsupportedError(
                f"{idle[0]} did not run on the calibration data, so it cannot be quantized; add --ignore {idle[0]}"
            )
        out: dict[tuple[int, Any], list[str]] = {}
        for i, group in enumerate(groups):
            for n in group:
                rule = self.recipe.rule(n, head=head)
                if not rule.weight_formats:
                    raise RecipeError(
                        f"{n} has a quantized input and a float weight, which is not implemented; give it weight bits or ignore it"
                    )
                out.setdefault((i, rule.site), []).append(n)
        return list(out.values())

    def _site(
        self, group: list[str], selected: dict[str, nn.Module], runs: Runs, plans: dict[str, Any], head: bool = False
    ) -> Decided:
        name = group[0]
        weights = {n: cast(Tensor, selected[n].weight).detach().float() for n in group}
        for n, w in weights.items():
            require_finite(w, f"the weight of {n}")
        fixed = {n: self._stored_embedding(n) for n in group if head and n in self.shared_head}
        rules = {n: self.recipe.rule(n, head=head) for n in group}
        stores = collect({name: selected[name]}, runs, self.store.scratch)
        statistics = SiteStatistics(name, stores[name], self.device, self.recipe.seed ^ zlib.crc32(name.encode()))
        result = search_site(name, weights, statistics, rules, self.recipe, fixed)
        stores[name].delete()
        plans["weights"] |= {n: {"kind": "linear", **p.to_json()} for n, p in result.weights.items()}
        for n in fixed:
            plans["weights"][n]["tied_to"] = self.shared_head[n]
        if result.input is not None:
            plans["inputs"][name] = result.input.to_json()
        return weights, selected, result

    def _replace(self, weights: dict[str, Tensor], selected: dict[str, nn.Module], result: SiteResult) -> None:
        plan = result.input
        for n, w in weights.items():
            source = result.rounded.get(n, w if plan is None or plan.smooth is None else w * plan.smooth)
            chosen = result.weights[n]
            scale = chosen.scale.to(w.device)
            quantized = quantize_tensor(source, scale, chosen.format, chosen.granularity, n, chosen.second_scale)
            bias = getattr(selected[n], "bias", None)
            set_module(self.model, n, QuantLinear.from_plan(quantized, plan, bias))

    # --- helpers ------------------------------------------------------------------------------------

    def _runs(self, run: Callable[[int], object]) -> Runs:
        """Return ``run`` of every batch, with the batch's mask."""
        return [(partial(run, i), self._mask(i)) for i in range(len(self.batches))]

    def _mask(self, i: int) -> Tensor | None:
        mask: Tensor | None = self.batches[i].get("attention_mask")
        return mask if mask is not None and mask.dim() == 2 else None

    def _quantized_embeddings(self) -> set[str]:
        return {n for n in self.structure.embeddings if self.recipe.selects(n) and self.recipe.embedding_formats()}

    def _stored_embedding(self, head: str) -> FixedWeight:
        """Return the weight of a head that shares its embedding's codes, read back from the first unit."""
        embedding = self.shared_head[head]
        fmt, stored = parse(self.store.plans()[0]["weights"][embedding]["format"]), self.store.saved(0)
        packed, scale = stored[f"{embedding}.weight_packed"].to(self.device), stored[f"{embedding}.weight_scale"].to(self.device)
        rows, columns = self.shapes[embedding]
        values = QuantizedTensor(packed, scale, fmt, PerRow(), (rows, columns)).dequantize()
        return FixedWeight(WeightPlan(head, fmt, scale), values)

    def _load_outer(self, skip: list[str]) -> None:
        """Make every parameter outside the blocks real, except those of the modules ``skip``."""
        without = (*self.structure.blocks, *skip)
        self.source.load(self.model, "", self.device, lambda n: not n.startswith(tuple(f"{b}." for b in without)))

    def _empty_embeddings(self) -> None:
        """Free the embeddings: from the second unit on, hidden states come from the store."""
        for name in self.structure.embeddings:
            table = self.model.get_submodule(name)
            if not self.keep and not isinstance(table, _ZeroEmbedding):
                set_module(self.model, name, _ZeroEmbedding(cast(int, table.embedding_dim)))
        self._load_outer(list(self.structure.tied))

    def _refuse_early_linears(self) -> None:
        """Raise UnsupportedError for a selected linear that runs before the blocks, or a model that works between them.

        Inputs of linears outside the blocks are gathered after the last block, from its output; and hidden states are
        carried from block to block as they are.
        """
        outer = {n: self.model.get_submodule(n) for n in self.structure.outer_linears if self.recipe.selects(n)}
        early = shared_inputs(outer, lambda: self.runner.first_hidden(self.batches[0]))
        if early:
            raise UnsupportedError(
                f"{early[0][0]} runs before the blocks, where linears are not quantized yet; add --ignore {early[0][0]}"
            )
        last = len(self.structure.blocks) - 1
        try:
            self.runner.arguments(last, self.batches[0])
        except Exception as first:  # perhaps because these blocks return tuples, which the stubs cannot know yet
            self.runner.tuples = True
            try:
                self.runner.arguments(last, self.batches[0])
            except Exception:
                raise first from None

    def _float_head_gram(self, head: str) -> Tensor:
        """Return X'X of the head's input in the float model, streamed block by block."""
        folder = self.store.scratch
        hidden = {i: folder / f"float-{i}.safetensors" for i in range(len(self.batches))}
        for i, batch in enumerate(self.batches):
            write_tensors(hidden[i], {"hidden": self.runner.first_hidden(batch)})
        for index, name in enumerate(self.structure.blocks):
            block = self.source.load(self.model, name, self.device)
            for i, batch in enumerate(self.batches):
                x = load_file(hidden[i])["hidden"].to(self.device)
                write_tensors(hidden[i], {"hidden": self.runner.run(index, block, batch, x)})
            self.source.release(self.model, name)
            self.progress("float statistics of the output head", index + 1, len(self.structure.blocks))

        def run(i: int) -> object:
            return self.runner.tail(self.batches[i], load_file(hidden[i])["hidden"].to(self.device))

        stub = nn.Identity()
        module = self.model.get_submodule(head)
        set_module(self.model, head, stub)  # only its input is wanted
        try:
            store = collect({head: stub}, self._runs(run), folder)[head]
        finally:
            set_module(self.model, head, module)
        gram = SiteStatistics(head, store, self.device, self.recipe.seed).gram
        store.delete()
        return gram

    def _tensors(self, module: nn.Module, name: str) -> dict[str, Tensor]:
        """Return what the checkpoint holds of ``module``: packed tensors as they are, the rest in the source's dtype."""
        prefix = f"{name}." if name else ""
        out = {}
        for key, tensor in module.state_dict(prefix=prefix).items():
            out[key] = tensor if key.rpartition(".")[2] in STORED else tensor.to(self.source.dtype(key))
        return out
