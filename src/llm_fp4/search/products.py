"""Formats and scales of the two inputs of a product, neither of them a weight: Q·K' and P·V.

Coordinate descent on the squared error of the product over a sample of calibration rows.
Source: LLM-FP4, arXiv:2310.16836, §4 (BERT and ViT quantize both products, per tensor).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llm_fp4.numerics import FloatFormat, fake_quantize, scale_of_max
from llm_fp4.plan import ProductPlan
from llm_fp4.recipe import SearchRules
from llm_fp4.search.descent import grids
from llm_fp4.search.grids import Grid, Loss, PaperGrid, search_formats

Rounding = tuple[FloatFormat, Tensor] | None
"""A format and its scale; None leaves an input in float."""


@dataclass
class ProductSample:
    """Pairs of inputs of a product.

    Attributes:
        first: (heads, rows, inner) of each pair. second: (heads, inner, columns) of each pair.
        counts: (1 or heads, rows, columns) 0 where the model masks the product out, or None.
    """

    first: list[Tensor]
    second: list[Tensor]
    counts: list[Tensor | None]


class ProductError:
    """The squared error of a product over a sample, () or (heads, 1, 1), as its inputs' rounding varies."""

    def __init__(self, sample: ProductSample, per_head: bool) -> None:
        self.sample, self.per_head = sample, per_head
        self._exact = [a @ b for a, b in zip(sample.first, sample.second, strict=True)]
        self.energy = sum(float(_weigh(e.square(), c).double().sum()) for e, c in zip(self._exact, sample.counts, strict=True))

    def __call__(self, first: Rounding, second: Rounding) -> Tensor:
        total: Tensor | None = None
        for a, b, e, c in zip(self.sample.first, self.sample.second, self._exact, self.sample.counts, strict=True):
            qa = a if first is None else fake_quantize(a, first[1], first[0])
            qb = b if second is None else fake_quantize(b, second[1], second[0])
            wrong = _weigh((qa @ qb - e).square_(), c).double().sum((1, 2))
            total = wrong if total is None else total + wrong
        assert total is not None
        return total.view(-1, 1, 1) if self.per_head else total.sum()

    def relative(self, first: Rounding, second: Rounding) -> float:
        """Return the error over the product's squared norm."""
        return float(self(first, second).sum()) / max(self.energy, 1e-30)


def search_product(
    sample: ProductSample, formats: tuple[Sequence[FloatFormat], Sequence[FloatFormat]], search: SearchRules | None, per_head: bool
) -> ProductPlan:
    """Return the formats and scales under which the product errs least.

    Args:
        formats: candidates of either input. search: None takes the first formats and the largest magnitudes.
    """
    error = ProductError(sample, per_head)
    starts = tuple(
        {f: scale_of_max(_absmax(side, per_head), f) for f in candidates}
        for side, candidates in zip((sample.first, sample.second), formats, strict=True)
    )
    chosen = [(fs[0], start[fs[0]]) for fs, start in zip(formats, starts, strict=True)]
    if search is not None:
        _, grid = grids(search)
        current: list[dict[FloatFormat, Tensor] | None] = [None, None]
        # the first round looks at either side alone: a coarse other side would hide the differences
        for round_ in range(search.rounds + 1):
            for side in (0, 1):
                other = None if round_ == 0 else chosen[1 - side]
                chosen[side], current[side] = _choose(side, other, starts[side], grid, current[side], error)
    scales = (chosen[0][1].float(), chosen[1][1].float())
    return ProductPlan((chosen[0][0], chosen[1][0]), scales, error.relative(*chosen))


def _choose(
    side: int, other: Rounding, starts: dict[FloatFormat, Tensor], grid: Grid, current: dict[FloatFormat, Tensor] | None,
    error: ProductError,
) -> tuple[tuple[FloatFormat, Tensor], dict[FloatFormat, Tensor]]:  # fmt: skip
    """Return the best format and scale of one side, given the other's, and the scales still in the race."""

    def loss(scale: Tensor, fmt: FloatFormat) -> Tensor:
        return error((fmt, scale), other) if side == 0 else error(other, (fmt, scale))

    losses: dict[FloatFormat, Loss] = {f: partial(loss, fmt=f) for f in starts}
    again = None if isinstance(grid, PaperGrid) else current
    found = search_formats(losses, starts, grid, again)
    best = min(found, key=lambda f: found[f].total)
    return (best, found[best].scale), {f: b.scale for f, b in found.items()}


def _weigh(x: Tensor, counts: Tensor | None) -> Tensor:
    return x if counts is None else x * counts


def _absmax(side: list[Tensor], per_head: bool) -> Tensor:
    if per_head:
        return torch.stack([x.abs().amax((1, 2)) for x in side]).amax(0).view(-1, 1, 1)
    return torch.stack([x.abs().amax() for x in side]).amax()
