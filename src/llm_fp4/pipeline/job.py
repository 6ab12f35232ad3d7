"""A quantization run over a model: its units, from the embeddings to the output head, in order."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from llm_fp4.calibration import shared_inputs
from llm_fp4.checkpoint import STORED, RunStore
from llm_fp4.errors import UnsupportedError
from llm_fp4.models import Batch, BlockRunner, Structure, WeightSource, embedding_multiplier, set_module, weight_shapes
from llm_fp4.nn import QuantEmbedding
from llm_fp4.numerics import PerRow, quantize_tensor, require_finite
from llm_fp4.pipeline.rotating import rotated
from llm_fp4.pipeline.sites import Decided, Linears, decide_site, replace_site, split_sites
from llm_fp4.pipeline.tied import Runs, float_head_gram, shared_heads, stored_embedding
from llm_fp4.plan import FixedWeight
from llm_fp4.progress import Progress, silent
from llm_fp4.recipe import Recipe
from llm_fp4.search import embedding_plan


class _ZeroEmbedding(nn.Module):
    """Stands for an embedding once its rows have been looked up: later units take hidden states from storage."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, self.dim, device=ids.device)


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
        self._rotate()
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
        for group in split_sites(shared_inputs(selected, lambda: run(0)), selected, self.recipe):
            decided.append(self._decide(group, selected, run, plans))
            if self.sequential:  # otherwise every site of the block reads what it reads in the float model
                replace_site(self.model, decided.pop())
        for site in decided:
            replace_site(self.model, site)
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

        for group in split_sites(shared_inputs(selected, lambda: run(0)), selected, self.recipe, head=True):
            replace_site(self.model, self._decide(group, selected, run, plans, head=True))
        tensors = self._tensors(self.model, "")
        apart = (*self.structure.blocks, *self.structure.embeddings)
        shared = {f"{h}.{t}" for h in self.shared_head for t in ("weight_packed", "weight_scale")}
        # a float head tied to a float embedding is that embedding's tensor
        shared |= {f"{h}.weight" for h, e in self.structure.tied.items() if e not in self._quantized_embeddings()}
        tensors = {n: t for n, t in tensors.items() if n not in shared and not n.startswith(tuple(f"{m}." for m in apart))}
        self.store.finish(unit, tensors, plans)

    def _rotate(self) -> None:
        """Let weights come rotated from now on, where the recipe says so; the head's are its own then."""
        rules = self.recipe.transforms
        if rules.rotation == "none" or self.store.done == self.store.units:
            return
        source = rotated(self.model, self.structure, self.source, self.runner, self.batches[0], self.device, self.recipe.seed)
        self.source = source
        if rules.online:
            self.recipe = self.recipe.with_transformed(source.hidden)

    # --- helpers ------------------------------------------------------------------------------------

    def _decide(
        self, group: list[str], selected: Linears, run: Callable[[int], object], plans: dict[str, Any], head: bool = False
    ) -> Decided:
        shared = {n: self.shared_head[n] for n in group if head and n in self.shared_head}
        fixed = {n: self._stored_embedding(n, embedding) for n, embedding in shared.items()}
        decided = decide_site(group, selected, self._runs(run), self.recipe, fixed, plans, self.store.scratch, self.device, head)
        for n, embedding in shared.items():
            plans["weights"][n]["tied_to"] = embedding
        return decided

    def _stored_embedding(self, head: str, embedding: str) -> FixedWeight:
        """Return the weight of a head that shares its embedding's codes, read back from the first unit."""
        stored = self.store.saved(0)
        packed, scale = (stored[f"{embedding}.{t}"].to(self.device) for t in ("weight_packed", "weight_scale"))
        return stored_embedding(head, self.store.plans()[0]["weights"][embedding], packed, scale, self.shapes[embedding])

    def _runs(self, run: Callable[[int], object]) -> Runs:
        """Return ``run`` of every batch, with the batch's mask."""
        return [(partial(run, i), self._mask(i)) for i in range(len(self.batches))]

    def _mask(self, i: int) -> Tensor | None:
        mask: Tensor | None = self.batches[i].get("attention_mask")
        return mask if mask is not None and mask.dim() == 2 else None

    def _quantized_embeddings(self) -> set[str]:
        return {n for n in self.structure.embeddings if self.recipe.selects(n) and self.recipe.embedding_formats()}

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
        return float_head_gram(
            head, self.runner, self.structure, self.source, self.batches, self.store.scratch, self._runs, self.device,
            self.recipe.seed, self.progress,
        )  # fmt: skip

    def _tensors(self, module: nn.Module, name: str) -> dict[str, Tensor]:
        """Return what the checkpoint holds of ``module``: packed tensors as they are, the rest in the source's dtype."""
        prefix = f"{name}." if name else ""
        out = {}
        for key, tensor in module.state_dict(prefix=prefix).items():
            out[key] = tensor if key.rpartition(".")[2] in STORED else tensor.to(self.source.dtype(key))
        return out
