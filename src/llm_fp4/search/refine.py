"""Coordinate descent over levels and scales: what is left after error compensation has gone through the columns once.

GPTQ decides each column knowing only the columns after it can still change. Going through them again, every level may
answer to all the others, and each row's scale to all its levels; neither step can increase the error.

Source: the coordinate-descent view of layer-wise quantization is QuantEase, arXiv:2309.01885, Algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_fp4.numerics import SMALLEST_STEP, FloatFormat, fake_quantize

_BLOCK = 128  # columns between two updates of all columns


def everything(goal: Tensor) -> list[slice]:
    """Return one piece of all columns of ``goal``."""
    return [slice(0, goal.shape[1])]


def fit_scale(target: Tensor, levels: Tensor, hessian: Tensor, scale: Tensor, pieces: list[slice] | None = None) -> Tensor:
    """Return the (out,) scales that minimise ``|(target - scale * levels) X'|^2`` row by row for given levels.

    A row keeps its ``scale`` where the best one is not positive (its levels are all zero, say).

    Args:
        target, levels: (in, out) float32. hessian: (in, in) X'X. scale: (out,).
        pieces: see :func:`sweep_levels`.
    """
    sums = []
    for p in pieces or everything(target):
        own = levels[:, p].contiguous()
        seen = hessian @ own
        sums.append(torch.stack(((target[:, p] * seen).sum(0), (own * seen).sum(0))))
    up, down = torch.cat(sums, 1)
    fitted = up / down.clamp_min(1e-30)
    return torch.where((down > 0) & (fitted > SMALLEST_STEP), fitted, scale)


def refine(
    goal: Tensor, now: Tensor, hessian: Tensor, scale: Tensor, fmt: FloatFormat, sweeps: int, pieces: list[slice] | None = None
) -> tuple[Tensor, Tensor]:
    """Return (in, out) values and (out,) scales whose output error is at most that of ``now``.

    Args:
        goal: (in, out) float32, the weight wanted: a column of the weight is contiguous. now: (in, out) on the grid of ``scale`` (out,).
        hessian: (in, in) X'X of the input, damped as the compensation wants it; its diagonal is positive.
        sweeps: passes over all columns, each followed by a fit of the scales.
        pieces: see :func:`sweep_levels`.
    """
    for _ in range(sweeps):
        levels = (now / scale).round_()
        scale = fit_scale(goal, levels, hessian, scale, pieces)
        now = sweep_levels(goal, levels * scale, scale.expand_as(goal), hessian, fmt, pieces)
    return now, scale


def sweep_levels(
    goal: Tensor, now: Tensor, step: Tensor, hessian: Tensor, fmt: FloatFormat, pieces: list[slice] | None = None
) -> Tensor:
    """Return ``now`` after every level in turn took its best place given all others; ``now`` is changed in place.

    Args:
        goal, now, step: (in, out) float32: the weight wanted, values on the grid, the step of every value.
        hessian: (in, in), its diagonal positive.
        pieces: of the out rows. Products of matrices are formed piece by piece, as their last bits may depend on their shapes;
            what goes element by element runs over all at once.
    """
    pieces = pieces or everything(goal)
    diagonal = hessian.diagonal()
    slopes = [hessian @ (goal[:, p] - now[:, p]) for p in pieces]  # (in, piece): minus half the gradient
    for start in range(0, len(goal), _BLOCK):
        stop = min(start + _BLOCK, len(goal))
        local, before = torch.cat([s[start:stop] for s in slopes], 1), now[start:stop].clone()
        within = hessian[start:stop, start:stop]
        for i in range(stop - start):
            j = start + i
            moved = fake_quantize(now[j] + local[i] / diagonal[j], step[j], fmt)
            local.addr_(within[i], moved - now[j], alpha=-1.0)
            now[j] = moved
        before.sub_(now[start:stop])
        for slope, p in zip(slopes, pieces, strict=True):
            slope.addmm_(hessian[:, start:stop], before[:, p].contiguous())
    return now
