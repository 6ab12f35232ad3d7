"""What the units of one run share: the model as far as it is done, its data, the recipe, the store of finished units."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from llm_fp4.checkpoint import STORED, RunStore
from llm_fp4.models import Batch, BlockRunner, Structure, WeightSource, placed, set_module, weight_shapes
from llm_fp4.numerics import QuantizedTensor
from llm_fp4.pipeline.float_inputs import FloatInputs
from llm_fp4.pipeline.prefix import PrefixRun
from llm_fp4.pipeline.sampling import token_mask
from llm_fp4.pipeline.sites import Decided, Linears, quantized_layers, selected_linears
from llm_fp4.pipeline.tied import Runs, shared_heads
from llm_fp4.pipeline.waves import Wave, decide_wave
from llm_fp4.plan import ATTENTION_INPUTS, CACHE_TENSORS, PREFIX_TENSORS, FixedWeight
from llm_fp4.progress import Progress, silent
from llm_fp4.recipe import Recipe
from llm_fp4.statistics import FloatRows
from llm_fp4.transforms import InputTransform

PACKED = (*STORED, *(f"{n}_scale" for n in ATTENTION_INPUTS), *CACHE_TENSORS, *PREFIX_TENSORS)  # stored as they are


@dataclass
class Workspace:
    """A model whose blocks are loaded one at a time, and all that its units need to be quantized.

    Attributes:
        batches: keyword arguments of the model; "attention_mask" (batch, tokens) marks padding.
        keep: leave every quantized module in the model (an in-memory run); otherwise blocks return to the meta device.
        gradients: of the float model's loss (see ``calibration.output_gradients``), None where all errors count alike.
        tables: packed embeddings of an in-memory run, until the next unit places them.
        prefix: gives each block the prefix that takes the part of the attention sink, None without one.
        later: quantized modules that the float model's own inputs must not see yet, by name.
        floats: the float model's run beside the quantized one, where error compensation wants it.
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
    gradients: Mapping[str, Tensor] | None = None
    tables: dict[str, QuantizedTensor] = field(default_factory=dict, init=False)
    prefix: PrefixRun | None = field(default=None, init=False)
    later: dict[str, nn.Module] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.runner = BlockRunner(self.model, self.structure.stacks, self.batches, self.store.outputs.load)
        self.shapes = weight_shapes(self.model, self.structure)
        self._outer: Linears = {}
        self.floats: FloatInputs | None = None
        if (search := self.recipe.search).compensation == "gptaq":
            names = (*self.structure.embeddings, *self.structure.aliases, *self.structure.outer_linears)
            self._outer = {n: self.model.get_submodule(n) for n in names}
            self.floats = FloatInputs(
                self.runner, self.store.outputs, self.store.scratch, self.mask, self._float_outer, search.inherited
            )

    @property
    def sequential(self) -> bool:
        """Whether what is quantized reads the outputs of what was quantized before it, not the float model's."""
        return self.recipe.search.propagation == "sequential"

    @property
    def shared_head(self) -> dict[str, str]:
        """Head → embedding of the pairs that stay one stored tensor."""
        return shared_heads(self.structure, self.recipe)

    def selected(self, names: list[str], head: bool = False) -> Linears:
        """Return those of the linears ``names`` that the recipe quantizes and that still are float."""
        return selected_linears(self.model, [n for n in names if n not in self.later], self.recipe, head)

    def decide(
        self, wave: Wave, selected: Linears, run: Callable[[int], object], plans: dict[str, Any], head: bool = False,
        fixed: dict[str, FixedWeight] | None = None, transform: InputTransform | None = None, wanted: FloatRows | None = None,
    ) -> list[Decided]:  # fmt: skip
        """Return the decisions of a wave's sites, see :func:`decide_wave`; ``plans`` gains their JSON.

        Args:
            run: runs what reads the sites' inputs on the batch of a number.
        """
        return decide_wave(
            wave, selected, self.runs(run), self.recipe, fixed or {}, plans, self.store.scratch, self.device, head, transform,
            self.gradients, wanted,
        )  # fmt: skip

    def replace(self, site: Decided) -> None:
        """Put the quantized layers of a site in the places of its linears."""
        for name, layer in quantized_layers(site).items():
            set_module(self.model, name, layer)

    def finish(self, block: str) -> None:
        """Count a block as finished: its outputs are known from now on."""
        self.runner.finish(block)
        if self.floats is not None:
            self.floats.finish(block)

    def last_blocks(self) -> list[str]:
        """Return the names under which the block outputs are stored that are still read."""
        return self.runner.last_blocks() + (self.floats.last_blocks() if self.floats is not None else [])

    def runs(self, run: Callable[[int], object]) -> Runs:
        """Return ``run`` of every batch, with the batch's mask."""
        return [(partial(run, i), self.mask(i)) for i in range(len(self.batches))]

    def mask(self, i: int) -> Tensor | None:
        """Return the (sequences, tokens) mask of batch ``i`` at what runs next, or None."""
        return token_mask(self.batches[i], self.runner)

    @contextmanager
    def _float_outer(self) -> Iterator[None]:
        """Let modules outside the blocks that were exchanged for quantized ones be the float model's again for a while."""
        exchanged = {n: m for n, m in self._outer.items() if self.model.get_submodule(n) is not m}
        with placed(self.model, exchanged):
            for n in exchanged:
                if n not in self.structure.aliases:
                    self.source.load(self.model, n, self.device)
            self._tie_aliases()
            yield
            for n in exchanged:
                self.source.release(self.model, n)

    def load_outer(self, everything: bool = False) -> None:
        """Make every parameter outside the blocks real; tied heads and tables only where ``everything`` is wanted."""
        without = (*self.structure.blocks, *(() if everything else (*self.structure.tied, *self.structure.aliases)))
        self.source.load(self.model, "", self.device, lambda n: not n.startswith(tuple(f"{b}." for b in without)))
        self._tie_aliases()

    def _tie_aliases(self) -> None:
        for alias, owner in self.structure.aliases.items():
            table = self.model.get_submodule(alias)
            if isinstance(table, nn.Embedding):  # until it is exchanged, too
                table.weight = cast(nn.Parameter, self.model.get_submodule(owner).weight)

    def tensors(self, module: nn.Module, name: str) -> dict[str, Tensor]:
        """Return what the checkpoint holds of ``module``: packed tensors as they are, the rest in the source's dtype."""
        prefix = f"{name}." if name else ""
        state = module.state_dict(prefix=prefix)
        folded = {f"{prefix}{n}.bias" if n else f"{prefix}bias" for n, m in module.named_modules() if getattr(m, "folded", False)}
        kept = {k for k in state if k.rpartition(".")[2] in PACKED or k in folded}
        return {k: t if k in kept else t.to(self.source.dtype(k)) for k, t in state.items()}
