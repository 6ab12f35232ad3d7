"""What the float model has at the input sites of a block, beside what arrives there through the quantized blocks.

The float model's blocks run a second time, on their own outputs, each while its weights are still float; its rows are those of the
calibration tokens, in the same order. Asymmetric error compensation wants the outputs that the float model has from them.

Source: GPTAQ, arXiv:2504.02692.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from llm_fp4 import ranks
from llm_fp4.calibration import collect
from llm_fp4.checkpoint import BlockOutputs
from llm_fp4.models import BlockRunner
from llm_fp4.pipeline.placing import placed
from llm_fp4.pipeline.sites import Linears
from llm_fp4.statistics import TokenStore


class FloatInputs:
    """The float model's run through the blocks, one block behind another, its outputs beside those of the quantized blocks.

    Args:
        like: the run through the quantized blocks. outputs: where block outputs of both runs are stored.
        outer: returns the float modules outside the blocks that were exchanged for quantized ones, by name.
    """

    def __init__(self, like: BlockRunner, outputs: BlockOutputs, outer: Callable[[], Linears]) -> None:
        self.runner = BlockRunner(like.model, like.stacks, like.batches, lambda name, i: outputs.load(f"{name}{_FLOAT}", i))
        self._outputs, self._outer = outputs, outer

    def block(self, name: str, firsts: Linears, mask: Callable[[int], Tensor | None], folder: Path) -> dict[str, TokenStore]:
        """Return the rows that ``firsts``, one linear of every site of the block, read; its outputs are stored."""

        def run(i: int) -> Any:
            self._outputs.save(f"{name}{_FLOAT}", i, self.runner.run(name, i))

        # once a stack has begun, nothing outside the blocks is read any more
        found = self._collect(firsts, run, mask, folder, first=name.endswith(".0"))
        ranks.wait()
        return found

    def tail(self, firsts: Linears, mask: Callable[[int], Tensor | None], folder: Path) -> dict[str, TokenStore]:
        """Return the rows that linears after the blocks read."""
        return self._collect(firsts, self.runner.tail, mask, folder, first=False)

    def _collect(
        self, firsts: Linears, run: Callable[[int], Any], mask: Callable[[int], Tensor | None], folder: Path, first: bool
    ) -> dict[str, TokenStore]:
        folder.mkdir(exist_ok=True)
        runs = [(lambda i=i: run(i), mask(i)) for i in range(len(self.runner.batches))]
        with placed(self.runner.model, self._outer()) if first else nullcontext():
            return collect(firsts, runs, folder, whole=True)

    def finish(self, name: str) -> None:
        """Count the block ``name`` as finished."""
        self.runner.finish(name)

    def last_blocks(self) -> list[str]:
        """Return the names under which the outputs are stored that are still read."""
        return [f"{name}{_FLOAT}" for name in self.runner.last_blocks()]


_FLOAT = ".float"  # ends the names of stored outputs: no block of a model is called so
