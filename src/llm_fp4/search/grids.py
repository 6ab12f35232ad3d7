"""Candidate scales and the one-dimensional minimisation over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from llm_fp4.numerics import FloatFormat

Loss = Callable[[Tensor], Tensor]
"""Maps scales of some shape to losses of the same shape; each element is minimised on its own."""


class Grid(Protocol):
    """Minimises a loss over scales, element by element."""

    def minimise(self, loss: Loss, start: Tensor, fmt: FloatFormat, current: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return (scale, loss), both of the shape of ``start``.

        Args:
            start: the scale of the calibrated maximum. current: a scale found before, or None.
        """
        ...


class _Best:
    """The best scale seen so far, element by element."""

    def __init__(self, loss: Loss, first: Tensor) -> None:
        self._loss, self.scale, self.value = loss, first.clone(), loss(first)

    def try_scale(self, scale: Tensor) -> None:
        value = self._loss(scale)
        better = value < self.value
        self.scale, self.value = torch.where(better, scale, self.scale), torch.where(better, value, self.value)


class Log2Grid:
    """Additive in log2 of the scale: a coarse sweep below the maximum, then halved steps around the best.

    The coarse sweep is skipped when a scale found in an earlier round is at hand.
    """

    def __init__(self, lowest: float, coarse: float = 0.25, highest: float = 0.25, refinements: int = 3) -> None:
        self._offsets = torch.arange(lowest, highest + 1e-6, coarse).tolist()
        self._fine = [coarse / 2 ** (i + 1) for i in range(refinements)]
        self._coarse = coarse

    def minimise(self, loss: Loss, start: Tensor, fmt: FloatFormat, current: Tensor | None) -> tuple[Tensor, Tensor]:
        best = _Best(loss, start if current is None else current)
        for offset in self._offsets if current is None else ():
            if offset != 0.0:
                best.try_scale(start * 2.0**offset)
        for step in self._fine if current is None else [self._coarse, *self._fine]:
            centre = best.scale
            best.try_scale(centre * 2.0**step)
            best.try_scale(centre * 2.0**-step)
        return best.scale, best.value


class PaperGrid:
    """``bias = gamma * bias_of_maximum``, gamma evenly spaced in [0.01, 1.2] (LLM-FP4, arXiv:2310.16836, §3).

    It depends on the unit of the tensor, and is a single point where that bias is 0; kept for comparison.
    """

    def __init__(self, candidates: int = 100, low: float = 0.01, high: float = 1.2) -> None:
        self._gammas = torch.linspace(low, high, candidates).tolist()

    def minimise(self, loss: Loss, start: Tensor, fmt: FloatFormat, current: Tensor | None) -> tuple[Tensor, Tensor]:
        bias = fmt.bias_of_scale(start)
        best = _Best(loss, start if current is None else current)
        for gamma in self._gammas:
            best.try_scale(fmt.scale_of_bias(gamma * bias).float().clamp(2.0**-126, 2.0**100))
        return best.scale, best.value
