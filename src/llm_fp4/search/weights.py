"""Scales and format of a weight by the error of the layer's output, scored with Gram matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llm_fp4.numerics import FloatFormat, fake_quantize, scale_of_max
from llm_fp4.search.grids import Grid, Loss, search_formats
from llm_fp4.search.ranking import as_operand, rank_product
from llm_fp4.statistics import Gram

_ROWS = 2048  # rows scored at once: bounds the temporaries of a vocabulary-sized weight


@dataclass
class WeightChoice:
    """A format, its (out,) scales and the (out,) squared output errors they give, without the input's own part."""

    format: FloatFormat
    scale: Tensor
    loss: Tensor

    def values(self, weight: Tensor) -> Tensor:
        """Return (out, in) ``weight`` rounded by this choice."""
        return fake_quantize(weight, self.scale.unsqueeze(1), self.format)


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


def energies(weight: Tensor, qq: Tensor) -> Tensor:
    """Return the (out,) float64 squared outputs of (out, in) ``weight`` over all tokens, for their (in, in) Gram matrix."""
    return ((weight @ qq) * weight).double().sum(1)


def output_loss(weight: Tensor, quantized: Tensor, gram: Gram, counts: Tensor | None = None) -> float:
    """Return the squared output error over all calibration tokens of (out, in) ``weight`` stored as ``quantized``.

    Args:
        counts: (out,) how much each output counts; None: all alike.
    """
    crossed = None if gram.eq is None else weight @ gram.eq
    loss = weight_loss(weight, quantized, gram.qq, crossed).double()
    if gram.ee is not None:
        loss = loss + energies(weight, gram.ee)
    return max(float((loss if counts is None else loss * counts).sum()), 0.0)


def choose_weight(
    weight: Tensor, gram: Gram, formats: Sequence[FloatFormat], grid: Grid, current: dict[FloatFormat, Tensor] | None = None,
    row_penalty: float = 0.0, counts: Tensor | None = None,
) -> tuple[WeightChoice, dict[FloatFormat, Tensor]]:  # fmt: skip
    """Return the best format with its scales, and the scales of every format still in the race (the next round's ``current``).

    Args:
        weight: (out, in) float32. row_penalty: added times the plain squared row error, for a weight that is an
            embedding too. counts: (out,) how much each row counts where formats are compared.
    """
    crossed = None if gram.eq is None else weight @ gram.eq
    qq = as_operand(gram.qq)

    def loss(scale: Tensor, fmt: FloatFormat) -> Tensor:
        parts = []
        for start in range(0, len(weight), _ROWS):
            rows = slice(start, start + _ROWS)
            w = weight[rows]
            quantized = fake_quantize(w, scale[rows].unsqueeze(1), fmt)
            value = weight_loss(w, quantized, qq, None if crossed is None else crossed[rows])
            if row_penalty != 0:
                value.add_((w - quantized).square_().sum(1), alpha=row_penalty)
            parts.append(value if counts is None else value.mul_(counts[rows]))
        return torch.cat(parts)

    losses: dict[FloatFormat, Loss] = {fmt: partial(loss, fmt=fmt) for fmt in formats}
    absmax = weight.abs().amax(1)
    found = search_formats(losses, {fmt: scale_of_max(absmax, fmt) for fmt in formats}, grid, current)
    fmt = min(found, key=lambda f: found[f].total)
    return WeightChoice(fmt, found[fmt].scale, found[fmt].value), {f: best.scale for f, best in found.items()}
