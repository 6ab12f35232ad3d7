"""Candidate scales and the one-dimensional minimisation over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from llm_fp4.numerics import SMALLEST_STEP, FloatFormat
from llm_fp4.plan import InputSpec

Key = TypeVar("Key", FloatFormat, InputSpec)
Loss = Callable[[Tensor], Tensor]
"""Maps scales of some shape to losses of the same shape; each element is minimised on its own."""


class Best:
    """The best scale seen so far, element by element."""

    def __init__(self, loss: Loss, first: Tensor) -> None:
        self._loss, self.scale, self.value = loss, first.clone(), loss(first)

    def try_scale(self, scale: Tensor) -> None:
        """Take the elements of ``scale`` that lose less than the best so far."""
        value = self._loss(scale)
        better = value < self.value
        self.scale, self.value = torch.where(better, scale, self.scale), torch.where(better, value, self.value)

    @property
    def total(self) -> float:
        """The loss summed over elements."""
        return float(self.value.double().sum())


class Grid(Protocol):
    """Minimises a loss over scales, element by element, in two steps; only the best formats of the first take the second."""

    def sweep(self, loss: Loss, start: Tensor, fmt: FloatFormat) -> Best:
        """Return the best of the coarse candidates around ``start``, the scale of the calibrated maximum."""
        ...

    def refine(self, best: Best, again: bool) -> None:
        """Improve ``best`` in place; ``again``: it comes from an earlier round, so the optimum may have moved."""
        ...


class Log2Grid:
    """Additive in log2 of the scale: a coarse sweep below the maximum, then halved steps around the best."""

    def __init__(self, lowest: float, coarse: float = 0.25, highest: float = 0.25, refinements: int = 3) -> None:
        self._offsets = torch.arange(lowest, highest + 1e-6, coarse).tolist()
        self._fine = [coarse / 2 ** (i + 1) for i in range(refinements)]
        self._coarse = coarse

    def sweep(self, loss: Loss, start: Tensor, fmt: FloatFormat) -> Best:
        best = Best(loss, start)
        for offset in self._offsets:
            if offset != 0.0:
                best.try_scale(start * 2.0**offset)
        return best

    def refine(self, best: Best, again: bool) -> None:
        for step in [self._coarse, *self._fine] if again else self._fine:
            centre = best.scale
            best.try_scale(centre * 2.0**step)
            best.try_scale(centre * 2.0**-step)


class PaperGrid:
    """``bias = gamma * bias_of_maximum``, gamma evenly spaced in [0.01, 1.2] (LLM-FP4, arXiv:2310.16836, §3).

    It depends on the unit of the tensor, and is a single point where that bias is 0; kept for comparison. There is no
    refinement: every round sweeps again.
    """

    def __init__(self, candidates: int = 100, low: float = 0.01, high: float = 1.2) -> None:
        self._gammas = torch.linspace(low, high, candidates).tolist()

    def sweep(self, loss: Loss, start: Tensor, fmt: FloatFormat) -> Best:
        bias = fmt.bias_of_scale(start)
        best = Best(loss, start)
        for gamma in self._gammas:
            best.try_scale(fmt.scale_of_bias(gamma * bias).float().clamp(SMALLEST_STEP, 2.0**100))
        return best

    def refine(self, best: Best, again: bool) -> None:
        pass


def search_formats(
    losses: Mapping[Key, Loss], starts: Mapping[Key, Tensor], grid: Grid, current: Mapping[Key, Tensor] | None, keep: int = 2,
    unite: Callable[[Best], object] = lambda best: None,
) -> dict[Key, Best]:  # fmt: skip
    """Return the best scales of every candidate still in the race.

    Args:
        losses, starts: of every candidate, a format or an input's spec. current: the scales an earlier round kept, or None in
            the first.
        keep: how many candidates are refined after the sweep, the best ones.
        unite: completes scales and losses of which ``losses`` give some elements, 0 for the rest: before candidates are compared.
    """
    if current is not None and not isinstance(grid, PaperGrid):
        found = {key: Best(losses[key], scale) for key, scale in current.items()}
    else:
        found = {
            key: grid.sweep(loss, starts[key], key.format if isinstance(key, InputSpec) else key) for key, loss in losses.items()
        }
        for key, scale in (current or {}).items():
            found[key].try_scale(scale)
        for best in found.values():
            unite(best)
        ranked = sorted(found, key=lambda key: found[key].total)[:keep]
        found = {key: best for key, best in found.items() if key in ranked}
    for best in found.values():
        grid.refine(best, current is not None)
        unite(best)
    return found
