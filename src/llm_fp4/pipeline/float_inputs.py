"""What the float model has at the input sites of a block, beside what arrives there through the quantized blocks.

The float model's blocks run a second time, on their own outputs, each while its weights are still float; its rows are those of the
calibration tokens, in the same order. Asymmetric error compensation wants the outputs that the float model has from them.

Source: GPTAQ, arXiv:2504.02692.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from llm_fp4 import ranks
from llm_fp4.calibration import collect
from llm_fp4.checkpoint import BlockOutputs
from llm_fp4.models import BlockRunner
from llm_fp4.pipeline.sites import Linears
from llm_fp4.statistics import FloatRows

_FLOAT = ".float"  # ends the names of its stored outputs: no block of a model is called so


class FloatInputs:
    """The float model's run through the blocks, one after another, its outputs stored beside those of the quantized blocks.

    Args:
        like: the run through the quantized blocks. outputs: where the block outputs of both are stored.
        folder: for rows. mask: of a batch, see :func:`~llm_fp4.calibration.token_rows`.
        outer: lets everything outside the blocks be float as long as it lasts. share: see ``FloatRows``.
    """

    def __init__(
        self, like: BlockRunner, outputs: BlockOutputs, folder: Path, mask: Callable[[int], Tensor | None],
        outer: Callable[[], AbstractContextManager[None]], share: float,
    ) -> None:  # fmt: skip
        self._runner = BlockRunner(like.model, like.stacks, like.batches, lambda name, i: outputs.load(f"{name}{_FLOAT}", i))
        self._outputs, self._folder, self._mask, self._outer, self._share = outputs, folder, mask, outer, share

    def block(self, name: str, firsts: Linears) -> dict[str, FloatRows]:
        """Return the rows that ``firsts``, one linear of every site of the block ``name``, read; its outputs are stored."""

        def run(i: int) -> None:
            self._outputs.save(f"{name}{_FLOAT}", i, self._runner.run(name, i))

        # once a stack has begun its blocks read nothing from outside
        with self._outer() if name in {names[0] for names in self._runner.stacks.values()} else nullcontext():
            found = self._collect(firsts, run)
        ranks.wait()
        return found

    def tail(self, firsts: Linears) -> dict[str, FloatRows]:
        """Return the rows that linears after the blocks read."""
        return self._collect(firsts, self._runner.tail)

    def _collect(self, firsts: Linears, run: Callable[[int], Any]) -> dict[str, FloatRows]:
        folder = self._folder / "float"
        folder.mkdir(exist_ok=True)
        runs = [(partial(run, i), self._mask(i)) for i in range(len(self._runner.batches))]
        return {n: FloatRows(rows, share=self._share) for n, rows in collect(firsts, runs, folder, whole=True).items()}

    def finish(self, name: str) -> None:
        """Count the block ``name`` as finished."""
        self._runner.finish(name)

    def last_blocks(self) -> list[str]:
        """Return the names under which those outputs are stored that are still read."""
        return [f"{name}{_FLOAT}" for name in self._runner.last_blocks()]
