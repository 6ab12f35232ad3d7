"""How far the model's output moves when one part of it is rounded: all blocks before it float, only those after it run.

Many changes are followed at once, so that each later block is loaded once for all changes in one block. What is held is the
hidden states of each change: a few thousand tokens, not a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llm_fp4.calibration import token_rows
from llm_fp4.errors import UnsupportedError
from llm_fp4.models import Batch, BlockRunner, Structure, WeightSource
from llm_fp4.nn import is_transposed
from llm_fp4.numerics import require_finite
from llm_fp4.pipeline.sampling import token_mask

Outputs = dict[str, list[Any]]
LOST = 100.0  # nats: stands for an output that is not finite


@dataclass
class Change:
    """One part of the model made another.

    Attributes:
        apply: holds it while its context lasts. outside: it lies outside the blocks, so that it holds in every one of them.
    """

    apply: Callable[[], AbstractContextManager[None]]
    outside: bool = False
    outputs: Outputs = field(default_factory=dict)  # of the blocks that ran under it


@contextmanager
def weights_as(values: dict[nn.Module, Tensor]) -> Iterator[None]:
    """Let linears and embeddings have other (out, in) weights while the block holds."""
    before = {module: module._parameters["weight"] for module in values}
    try:
        for module, value in values.items():
            stored = value.t().contiguous() if is_transposed(module) else value
            module._parameters["weight"] = nn.Parameter(stored, requires_grad=False)
        yield
    finally:
        for module, weight in before.items():
            module._parameters["weight"] = weight


@contextmanager
def inputs_as(modules: Sequence[nn.Module], rounding: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let ``modules`` read ``rounding`` of the (n, in) rows they are given while the block holds."""

    def pre(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        return (rounding(x.reshape(-1, x.shape[-1])).to(x.dtype).view(x.shape), *args[1:])

    handles = [module.register_forward_pre_hook(pre) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class FloatRun:
    """The float model over a few batches, block by block, and what becomes of its output under changes.

    Attributes:
        order: names of the blocks as they run; known after :meth:`first`.
        runner: stands before the next block, on the float model's outputs.
    """

    def __init__(
        self, model: nn.Module, structure: Structure, source: WeightSource, batches: list[Batch], device: torch.device
    ) -> None:
        self.model, self.source, self.batches, self.device = model, source, batches, device
        self.runner = BlockRunner(model, structure.stacks, batches, self._output)
        self.order: list[str] = []
        self._float: Outputs = {}
        self._last: Outputs = {}
        self._own: Outputs = {}

    def _output(self, block: str, batch: int) -> Any:
        return (self._own.get(block) or self._float[block])[batch]

    def first(self, look: Callable[[str | None], None]) -> None:
        """Run the float model once and come back to its start; ``look`` sees every block about to run, and None at the end.

        Raises:
            UnsupportedError: it cannot be run block by block, or gives no logits.
        """
        while (name := self.runner.next_block()) is not None:
            self.runner.check(name)
            self.source.load(self.model, name, self.device)
            look(name)
            self.order.append(name)
            self.advance(name)
        look(None)
        self._last = dict(self._float)
        for i in range(len(self.batches)):
            require_finite(self._logits(i), "the float model's logits on calibration tokens")
        self._float = {}
        self.runner.done = dict.fromkeys(self.runner.stacks, 0)

    def load(self, name: str) -> nn.Module:
        """Return the block ``name`` with its parameters real."""
        return self.source.load(self.model, name, self.device)

    def advance(self, name: str) -> None:
        """Run the block ``name``, which is loaded, and release it."""
        self._run(name, self._float)
        self.source.release(self.model, name)
        self.runner.finish(name)
        self._prune(self._float)

    def _run(self, name: str, outputs: Outputs) -> None:
        outputs[name] = [self.runner.run(name, i) for i in range(len(self.batches))]

    def _prune(self, outputs: Outputs) -> None:
        last = self.runner.last_blocks()
        for old in [n for n in outputs if n not in last]:
            del outputs[old]

    def divergences(self, position: int, changes: Sequence[Change]) -> list[float]:
        """Return KL(float || changed) in nats a prediction of every change, each by itself.

        Args:
            position: in ``order``, of the next block, in which or before which the changes act; its block is loaded. After the last
                block: the changes act behind it.
        """
        done = dict(self.runner.done)
        try:
            for name in self.order[position:]:
                inside = name == self.order[position]
                if not inside:
                    self.load(name)
                for change in changes:
                    self._own = change.outputs
                    with change.apply() if inside or change.outside else nullcontext():
                        self._run(name, change.outputs)
                if not inside:
                    self.source.release(self.model, name)
                self.runner.finish(name)
                for change in changes:
                    self._prune(change.outputs)
            return self._compare(changes, position == len(self.order))
        finally:
            self.runner.done, self._own = done, {}
            for change in changes:
                change.outputs = {}

    def _compare(self, changes: Sequence[Change], behind: bool) -> list[float]:
        sums, count = [0.0] * len(changes), 0
        for i in range(len(self.batches)):
            before, self._own, self._float = self._float, {}, self._last
            reference = self._logits(i)
            self._float = before
            log_p = torch.log_softmax(reference, -1)
            p = log_p.exp()
            count += len(p)
            for n, change in enumerate(changes):
                self._own = change.outputs
                with change.apply() if behind or change.outside else nullcontext():
                    sums[n] += _divergence(reference, log_p, p, self._logits(i))
        return [s / count if math.isfinite(s) else LOST for s in sums]

    def _logits(self, batch: int) -> Tensor:
        """Return the (predictions, classes) float32 logits of a batch, without padding."""
        out = self.runner.tail(batch)
        logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
        if not isinstance(logits, Tensor) or logits.shape[-1] < 2:
            raise UnsupportedError(
                f"a budget measures the divergence of the model's predictions, and {type(self.model).__name__} gives no logits of "
                "two classes or more; choose widths by overrides instead"
            )
        return token_rows(logits.float(), token_mask(self.batches[batch], self.runner))


def _divergence(reference: Tensor, log_p: Tensor, p: Tensor, logits: Tensor) -> float:
    """Return KL summed over rows: log Σ p exp(d) - Σ p d of the logits' differences d, in which no large terms cancel."""
    d = logits - reference
    d -= (p * d).sum(-1, keepdim=True)
    return float(torch.logsumexp(log_p + d, -1).double().clamp_min(0).sum())
