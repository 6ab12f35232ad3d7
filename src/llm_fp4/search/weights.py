"""Scales and format of a weight by the error of the layer's output, scored with Gram matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from llm_fp4 import ranks
from llm_fp4.numerics import FloatFormat, fake_quantize, scale_of_max
from llm_fp4.search.grids import Best, Grid, Loss, search_formats
from llm_fp4.search.ranking import as_operand, rank_product
from llm_fp4.statistics import Gram, SiteStatistics

_ROWS = 2048  # rows scored at once: bounds the temporaries of a vocabulary-sized weight


class InputRounding(Protocol):
    """What is decided of an input."""

    def quantize(self, rows: Tensor) -> Tensor:
        """Return (n, in) rows rounded."""
        ...


@dataclass
class WeightChoice:
    """A format, its (out,) scales and the (out,) squared output errors they give, without the input's own part."""

    format: FloatFormat
    scale: Tensor
    loss: Tensor

    def values(self, weight: Tensor, rows: slice = slice(None)) -> Tensor:
        """Return (out, in) ``weight``, or some of its rows, rounded by this choice."""
        return fake_quantize(weight[rows], self.scale[rows].unsqueeze(1), self.format)


def weight_loss(weight: Tensor, quantized: Tensor, qq: Tensor, crossed: Tensor | None) -> Tensor:
    """Return the (out,) squared output error caused by ``weight - quantized``, see :class:`Gram`.

    Args:
        qq: (in, in) Q'Q, float32 or an operand for ranking.
        crossed: (out, in) ``weight @ eq``, or None where the input is exact. The part that does not depend on ``quantized``
            (W ee W') is left out, so values may be negative.
    """
    d = weight - quantized
    inner = rank_product(d, qq)
    if crossed is not None:
        inner.add_(crossed, alpha=2.0)
    return inner.mul_(d).sum(1)


def row_losses(weight: Tensor, values: Callable[[slice], Tensor], gram: Gram) -> Tensor:
    """Return the (out,) float64 squared output errors over all calibration tokens, the input's own part included.

    Args:
        weight: (out, in) float32. values: gives some of its rows as they are stored.
    """
    lost = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    for rows in ranks.own(len(weight), _ROWS):
        w = weight[rows]
        crossed = None if gram.eq is None else w @ gram.eq
        lost[rows] = weight_loss(w, values(rows), gram.qq, crossed).double()
        if gram.ee is not None:
            lost[rows] += row_energy(w, gram.ee)
    return ranks.united(lost)


def row_energy(weight: Tensor, gram: Tensor) -> Tensor:
    """Return the (out,) float64 squared outputs of (out, in) ``weight`` under (in, in) X'X."""
    return (weight @ gram).mul_(weight).double().sum(1)


def total(rows: Tensor, counts: Tensor | None) -> float:
    """Return the sum of (out,) ``rows``, each times what it counts; None: all alike."""
    return float((rows if counts is None else rows * counts).sum())


def output_energy(weight: Tensor, gram: Tensor, counts: Tensor | None = None) -> float:
    """Return the squared output of (out, in) ``weight`` over all calibration tokens, whose X'X is (in, in) ``gram``.

    Args:
        counts: (out,) how much each output counts.
    """
    energy = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    for rows in ranks.own(len(weight), _ROWS):
        energy[rows] = row_energy(weight[rows], gram)
    return total(ranks.united(energy), counts)


def losses_by_tokens(
    weight: Tensor, values: Callable[[slice], Tensor], statistics: SiteStatistics, quantize: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """Return what :func:`row_losses` does, from the outputs of all tokens: cheaper than Gram matrices where tokens are few."""
    lost = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    own = ranks.own(len(weight), _ROWS)
    for (x, wanted), root in zip(statistics.pairs(), statistics.roots(), strict=True) if own else ():
        q = x if quantize is None else quantize(x)
        e = wanted - q
        for rows in own:
            w = weight[rows]
            wrong = q @ (w - values(rows)).t()
            if quantize is not None or statistics.wanted is not None:
                wrong.addmm_(e, w.t())
            if root is not None:
                wrong.mul_(root)
            lost[rows] += wrong.square_().sum(0, dtype=torch.float64)
    return ranks.united(lost)


def few_tokens(statistics: SiteStatistics) -> bool:
    """Return whether an error costs less as two products with all tokens than as three with Gram matrices."""
    return not statistics.centered and 2 * statistics.tokens.tokens < 3 * statistics.tokens.channels


def site_losses(
    weight: Tensor, values: Callable[[slice], Tensor], statistics: SiteStatistics, choice: InputRounding | None, gram: Gram | None
) -> Tensor:
    """Return the (out,) float64 squared output errors over all calibration tokens.

    Args:
        gram: under ``choice``, the rounding of the input; None where :func:`few_tokens` make it cheaper without.
    """
    if gram is None:
        return losses_by_tokens(weight, values, statistics, choice.quantize if choice else None)
    return row_losses(weight, values, gram)


def site_energy(weight: Tensor, statistics: SiteStatistics, counts: Tensor | None = None) -> float:
    """Return the squared output of (out, in) ``weight`` over all calibration tokens, the cheaper way, the input without its offset
    subtracted: what the float layer gives."""
    statistics = statistics.base or statistics
    if statistics.tokens.tokens < weight.shape[1]:
        return total(losses_by_tokens(weight, lambda rows: torch.zeros((), device=weight.device), statistics, None), counts)
    return output_energy(weight, statistics.gram, counts)


def output_loss(weight: Tensor, quantized: Tensor, gram: Gram, counts: Tensor | None = None) -> float:
    """Return the squared output error over all calibration tokens of (out, in) ``weight`` stored as ``quantized``."""
    return max(total(row_losses(weight, lambda rows: quantized[rows], gram), counts), 0.0)


def choose_weight(
    weight: Tensor, gram: Gram | None, formats: Sequence[FloatFormat], grid: Grid, current: dict[FloatFormat, Tensor] | None = None,
    row_penalty: float = 0.0, counts: Tensor | None = None,
) -> tuple[WeightChoice, dict[FloatFormat, Tensor]]:  # fmt: skip
    """Return the best format with its scales, and the scales of every format still in the race (the next round's ``current``).

    Args:
        weight: (out, in) float32. gram: None where the plain squared row error is what counts.
        row_penalty: added times the plain squared row error, for a weight that is an embedding too.
        counts: (out,) how much each row counts where formats are compared.
    """
    own = ranks.own(len(weight), _ROWS)
    crossed = {} if gram is None or gram.eq is None else {rows.start: weight[rows] @ gram.eq for rows in own}
    qq = None if gram is None else as_operand(gram.qq)
    row_penalty = 1.0 if gram is None else row_penalty

    def loss(scale: Tensor, fmt: FloatFormat) -> Tensor:
        lost = torch.zeros(len(weight), device=weight.device)
        for rows in own:
            w = weight[rows]
            quantized = fake_quantize(w, scale[rows].unsqueeze(1), fmt)
            if qq is not None:
                lost[rows] = weight_loss(w, quantized, qq, crossed.get(rows.start))
            if row_penalty:
                lost[rows] += (w - quantized).square_().sum(1).mul_(row_penalty)
            if counts is not None:
                lost[rows] *= counts[rows]
        return lost

    others = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    for rows in own:
        others[rows] = False

    def unite(best: Best) -> None:
        """Rows are minimised each on its own, so ranks need not meet before formats are compared."""
        best.scale, best.value = ranks.united(torch.stack((best.scale, best.value)).masked_fill_(others, 0.0))

    losses: dict[FloatFormat, Loss] = {fmt: partial(loss, fmt=fmt) for fmt in formats}
    absmax = weight.abs().amax(1)
    found = search_formats(losses, {fmt: scale_of_max(absmax, fmt) for fmt in formats}, grid, current, unite=unite)
    fmt = min(found, key=lambda f: found[f].total)
    return WeightChoice(fmt, found[fmt].scale, found[fmt].value), {f: best.scale for f, best in found.items()}
