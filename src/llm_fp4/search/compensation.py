"""Error compensation on any grid: each column's rounding error is made up for by the columns not yet rounded.

Source: GPTQ, arXiv:2210.17323, Algorithm 1, with the Hessian of the quantized, shifted input. Formats and scales are
those the search found; only which level each weight takes changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_fp4.kernels.simulate import fake_quantize_input
from llm_fp4.numerics import FloatFormat, fake_quantize
from llm_fp4.plan import FixedWeight, SiteResult, WeightPlan
from llm_fp4.search.weights import weight_loss
from llm_fp4.statistics import Gram, SiteStatistics

_BLOCK = 128  # columns between two updates of all later columns


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the inverse of ``hessian`` (in, in) with ``damping`` of its mean diagonal added."""
    damped = hessian.double().clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = diagonal.mean().clamp_min(1e-12)  # dead channels
    diagonal += damping * diagonal.mean().clamp_min(1e-12)
    lower = torch.linalg.cholesky(damped)
    inverse = torch.cholesky_inverse(lower)
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


def compensate(weight: Tensor, gram: Gram, scale: Tensor, fmt: FloatFormat, damping: float = 0.01) -> Tensor:
    """Return (out, in) values on the grid ``scale * levels`` whose output error is small, not each value's own.

    The float target under a rounded input is first moved to the weight that serves the rounded input best
    (``W + W E'Q (Q'Q)^-1``), so that the input's error is compensated too.

    Args:
        weight: (out, in) float32. scale: (out,) float32, or the steps (out, in) of block scales, which stay with their columns.
        damping: share of the mean diagonal added to the Hessian.
    """
    order = gram.qq.diagonal().argsort(descending=True, stable=True)
    hessian = gram.qq[order][:, order]
    work = weight.clone()
    if gram.eq is not None:
        damped = gram.qq.double().clone()
        damped.diagonal().add_(damping * damped.diagonal().mean().clamp_min(1e-12))
        work += torch.linalg.solve(damped, (weight @ gram.eq).double().t()).t().float()
    work = work[:, order]
    factor = inverse_factor(hessian, damping)
    step = scale[:, order] if scale.dim() == 2 else scale.unsqueeze(1).expand_as(work)
    out = torch.empty_like(work)
    for start in range(0, work.shape[1], _BLOCK):
        stop = min(start + _BLOCK, work.shape[1])
        block, local = work[:, start:stop], factor[start:stop, start:stop]
        errors = torch.empty_like(block)
        for i in range(stop - start):
            column = block[:, i : i + 1]
            rounded = fake_quantize(column, step[:, start + i : start + i + 1], fmt)
            out[:, start + i : start + i + 1] = rounded
            error = (column - rounded) / local[i, i]
            errors[:, i : i + 1] = error
            block[:, i + 1 :].addmm_(error, local[i : i + 1, i + 1 :], alpha=-1.0)
        work[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1.0)
    restored = torch.empty_like(out)
    restored[:, order] = out
    return restored


def compensate_site(
    weights: dict[str, Tensor], statistics: SiteStatistics, result: SiteResult, damping: float, fixed: dict[str, FixedWeight] | None
) -> None:
    """Put compensated values of every weight of a searched site into ``result.rounded``, where they beat plain rounding.

    Args:
        weights: (out, in) float32 of each operand. fixed: operands that are quantized already.
    """
    plan = result.input
    if plan is None:
        gram = statistics.quantized_gram(None)
    else:
        gram = statistics.quantized_gram(lambda x: fake_quantize_input(x, plan.spec, plan.scale, plan.shift, plan.smooth))
    by_format: dict[FloatFormat, list[str]] = {}
    for n in weights:
        if n not in (fixed or {}):
            by_format.setdefault(result.weights[n].format, []).append(n)
    for fmt, names in by_format.items():  # one pass over the columns for all operands of a format
        stacked = torch.cat([weights[n] for n in names])
        scale = torch.cat([result.weights[n].step(stacked.shape[1]).expand_as(weights[n]) for n in names])
        values = compensate(stacked, gram, scale, fmt, damping)
        start = 0
        for n in names:
            stop = start + len(weights[n])
            result.rounded[n] = _better_rows(weights[n], values[start:stop], result.weights[n], gram)
            start = stop


def _better_rows(weight: Tensor, compensated: Tensor, plan: WeightPlan, gram: Gram) -> Tensor:
    """Return the compensated rows, or the nearest levels for rows where these do less harm; update the plan's error."""
    nearest = fake_quantize(weight, plan.step(weight.shape[1]), plan.format)
    crossed = None if gram.eq is None else weight @ gram.eq
    before, after = (weight_loss(weight, v, gram.qq, crossed) for v in (nearest, compensated))
    if plan.error is not None:
        base = 0.0 if gram.ee is None else float(((weight @ gram.ee) * weight).double().sum())
        old = max(float(before.double().sum()) + base, 1e-30)
        plan.error *= max(float(torch.minimum(before, after).double().sum()) + base, 0.0) / old
    return torch.where((after <= before).unsqueeze(1), compensated, nearest)
