"""Error compensation on any grid: each column's rounding error is made up for by the columns not yet rounded.

Source: GPTQ, arXiv:2210.17323, Algorithm 1, with the Hessian of the quantized, shifted input. Formats are those the
search found; which level each weight takes changes, and with sweeps of refinement the scales do too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_fp4.numerics import FloatFormat, fake_quantize
from llm_fp4.plan import FixedWeight, SiteResult, WeightPlan
from llm_fp4.recipe import SearchRules
from llm_fp4.search.inputs import InputChoice
from llm_fp4.search.refine import refine
from llm_fp4.search.weights import energies, weight_loss
from llm_fp4.statistics import Gram, SiteStatistics

_BLOCK = 128  # columns between two updates of all later columns
_ROWS = 8192  # rows at once: bounds the temporaries of a vocabulary-sized weight
_STARTS = (1.0, 0.9, 1.1, 0.8, 1.2)


def inverse_factor(hessian: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped ``hessian`` (in, in)."""
    lower = torch.linalg.cholesky(hessian.double())
    inverse = torch.cholesky_inverse(lower)
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


def joint_target(weight: Tensor, gram: Gram, damping: float) -> Tensor:
    """Return the (out, in) weight that serves the rounded input best, ``W + W E'Q (Q'Q)^-1``; ``weight`` for an exact input.

    Rounding towards it makes up for the input's error too.
    """
    if gram.eq is None:
        return weight
    correction: Tensor = torch.linalg.solve(damped(gram.qq, damping).double(), (weight @ gram.eq).double().t()).t().float()
    return weight + correction


def damped(hessian: Tensor, damping: float) -> Tensor:
    """Return ``hessian`` (in, in) with ``damping`` of its mean diagonal added to the diagonal, and dead channels made live."""
    out = hessian.clone()
    diagonal = out.diagonal()
    mean = diagonal.mean().clamp_min(1e-12)
    diagonal[diagonal == 0] = mean
    diagonal += damping * mean
    return out


def compensate(target: Tensor, hessian: Tensor, scale: Tensor, fmt: FloatFormat) -> Tensor:
    """Return (out, in) values on the grid ``scale * levels`` whose output error is small, not each value's own.

    Args:
        target: (out, in) float32, see :func:`joint_target`. hessian: (in, in), see :func:`damped`.
        scale: (out,) float32, or (out, in) steps, each of which stays with its column.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    work = target[:, order]
    factor = inverse_factor(hessian[order][:, order])
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


def compensated(weight: Tensor, gram: Gram, scale: Tensor, fmt: FloatFormat, search: SearchRules) -> tuple[Tensor, Tensor]:
    """Return (out, in) values on the grid of ``fmt`` and their (out,) scales, refined from several first scales.

    The scale that rounds best is not the one that compensates best, and refinement only finds the nearest optimum: each row
    keeps the best of ``search.starts`` multiples of ``scale``.
    """
    target, hessian = joint_target(weight, gram, search.damping), damped(gram.qq, search.damping)
    parts = []
    for start in range(0, max(len(weight), 1), _ROWS):
        rows = slice(start, start + _ROWS)
        best: tuple[Tensor, Tensor, Tensor] | None = None
        for factor in _STARTS[: search.starts]:
            first = scale[rows] * factor
            values, fitted = refine(target[rows], compensate(target[rows], hessian, first, fmt), hessian, first, fmt, search.sweeps)
            loss = weight_loss(target[rows], values, hessian, None)
            if best is not None:
                won = loss < best[2]
                values = torch.where(won.unsqueeze(1), values, best[0])
                fitted, loss = torch.where(won, fitted, best[1]), torch.where(won, loss, best[2])
            best = values, fitted, loss
        assert best is not None
        parts.append(best[:2])
    return torch.cat([v for v, _ in parts]), torch.cat([s for _, s in parts])


def compensate_site(
    weights: dict[str, Tensor],
    statistics: SiteStatistics,
    result: SiteResult,
    search: SearchRules,
    fixed: dict[str, FixedWeight] | None,
) -> None:
    """Put compensated values of every weight of a searched site into ``result.rounded``, where they beat plain rounding.

    Args:
        weights: (out, in) float32 of each operand. fixed: operands that are quantized already.
    """
    plan = result.input
    choice = None if plan is None else InputChoice(plan.spec, plan.scale, plan.shift, 0.0)
    gram = statistics.quantized_gram(choice.quantize if choice else None, choice.unit if choice else None)
    counts = statistics.outputs(weights)
    by_format: dict[FloatFormat, list[str]] = {}
    for n in weights:
        if n not in (fixed or {}):
            by_format.setdefault(result.weights[n].format, []).append(n)
    for fmt, names in by_format.items():  # one pass over the columns for all operands of a format
        stacked = torch.cat([weights[n] for n in names])
        scale = torch.cat([result.weights[n].scale for n in names])
        values, scale = compensated(stacked, gram, scale, fmt, search)
        start = 0
        for n in names:
            rows = slice(start, start + len(weights[n]))
            result.rounded[n] = _better_rows(weights[n], values[rows], scale[rows], result.weights[n], gram, counts[n])
            start = rows.stop


def _better_rows(weight: Tensor, values: Tensor, scale: Tensor, plan: WeightPlan, gram: Gram, counts: Tensor) -> Tensor:
    """Return the compensated rows, or the nearest levels for rows where these do less harm; update the plan."""
    nearest = fake_quantize(weight, plan.scale.unsqueeze(1), plan.format)
    crossed = None if gram.eq is None else weight @ gram.eq
    before, after = (weight_loss(weight, v, gram.qq, crossed) for v in (nearest, values))
    if plan.error is not None:
        base = 0.0 if gram.ee is None else float((energies(weight, gram.ee) * counts).sum())
        old = max(float((before.double() * counts).sum()) + base, 1e-30)
        plan.error *= max(float((torch.minimum(before, after).double() * counts).sum()) + base, 0.0) / old
    better = after <= before
    plan.scale = torch.where(better, scale, plan.scale)
    return torch.where(better.unsqueeze(1), values, nearest)
