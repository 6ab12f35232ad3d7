"""Error compensation on any grid: each column's rounding error is made up for by the columns not yet rounded.

Source: GPTQ, arXiv:2210.17323, Algorithm 1, with the Hessian of the quantized, shifted input. Formats are those the
search found; which level each weight takes changes, and with sweeps of refinement the scales do too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from llm_fp4 import ranks
from llm_fp4.numerics import FloatFormat, fake_quantize
from llm_fp4.plan import FixedWeight, SiteResult, WeightPlan
from llm_fp4.recipe import SearchRules
from llm_fp4.search.factor import Factor, Feedback, damped
from llm_fp4.search.inputs import InputChoice
from llm_fp4.search.refine import everything, refine
from llm_fp4.search.weights import few_tokens, site_losses, total
from llm_fp4.statistics import Gram, SiteStatistics

_BLOCK = 128  # columns between two updates of all later columns
_ROWS = 8192  # rows at once: bounds the temporaries of a vocabulary-sized weight
_PIECE = 2048  # rows of a product of matrices
_SIDE_BY_SIDE = 4096  # rows of several starts at once; with more nothing is gained
_STARTS = (1.0, 0.9, 1.1, 0.8, 1.2)


def compensate(goal: Tensor, feedback: Feedback, scale: Tensor, fmt: FloatFormat, pieces: list[slice] | None = None) -> Tensor:
    """Return (in, out) values on the grid ``scale * levels`` whose output error is small, not each value's own.

    Args:
        goal: (in, out) float32, see :meth:`Factor.target`. scale: (out,) float32, or (in, out) steps, each of which stays with its
            column. pieces: see :func:`~llm_fp4.search.refine.sweep_levels`.
    """
    pieces = pieces or everything(goal)
    order, pull = feedback.order.tolist(), feedback.pull
    work, out = goal[feedback.order], torch.empty_like(goal)
    lost = [torch.empty_like(goal[:, p], memory_format=torch.contiguous_format) for p in pieces]
    for start in range(0, len(work), _BLOCK):
        stop = min(start + _BLOCK, len(work))
        block, error = work[start:stop].clone(), torch.empty_like(work[start:stop])
        if start:
            block += torch.cat([pull[:start, start:stop].t() @ e[:start] for e in lost], 1)
        for i in range(stop - start):
            column = order[start + i]
            rounded = fake_quantize(block[i], scale[column] if scale.dim() == 2 else scale, fmt)
            out[column], error[i] = rounded, work[start + i] - rounded
            block[i + 1 :].addr_(pull[start + i, start + i + 1 : stop], error[i])
        for e, p in zip(lost, pieces, strict=True):
            e[start:stop] = error[:, p]
    return out


def compensated(weight: Tensor, gram: Gram, scale: Tensor, fmt: FloatFormat, search: SearchRules) -> tuple[Tensor, Tensor]:
    """Return (out, in) values on the grid of ``fmt`` and their (out,) scales, refined from several first scales.

    The scale that rounds best is not the one that compensates best, and refinement only finds the nearest optimum: each row
    keeps the best of ``search.starts`` multiples of ``scale``.
    """
    hessian = damped(gram.qq, search.damping)
    factor = Factor(hessian)
    own = ranks.own(len(weight), _PIECE)
    goals = [factor.target(weight[rows], gram).t() for rows in own]
    feedback = factor.feedback()
    values, fitted = torch.zeros_like(weight), torch.zeros_like(scale)
    while own:
        together = max(1, min(len(own), _ROWS // len(weight[own[0]])))
        rows, own = own[:together], own[together:]
        goal, goals = torch.cat(goals[:together], 1), goals[together:]  # (in, rows): a column of the weight is contiguous
        best = _best_start(goal, feedback, hessian, torch.cat([scale[r] for r in rows]), fmt, search, _places(rows))
        for r, place in zip(rows, _places(rows), strict=True):
            values[r], fitted[r] = best[0][:, place].t(), best[1][place]
    return ranks.united(values), ranks.united(fitted)


def _places(rows: list[slice]) -> list[slice]:
    """Return where ``rows`` lie when they are put side by side."""
    ends = list(accumulate(r.stop - r.start for r in rows))
    return [slice(end - (r.stop - r.start), end) for r, end in zip(rows, ends, strict=True)]


def _best_start(
    goal: Tensor, feedback: Feedback, hessian: Tensor, scale: Tensor, fmt: FloatFormat, search: SearchRules, pieces: list[slice]
) -> tuple[Tensor, Tensor]:
    """Return the (in, rows) values and (rows,) scales, of each row those of its best start."""
    # starts side by side as far as rows go: what is done for every column in turn costs hardly more for more rows
    width, starts = goal.shape[1], _STARTS[: search.starts]
    together = max(1, _SIDE_BY_SIDE // width)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for factors in (starts[i : i + together] for i in range(0, len(starts), together)):
        places = [slice(k * width + p.start, k * width + p.stop) for k in range(len(factors)) for p in pieces]
        goals, first = goal.repeat(1, len(factors)), torch.cat([scale * factor for factor in factors])
        values = compensate(goals, feedback, first, fmt, places)
        values, fitted = refine(goals, values, hessian, first, fmt, search.sweeps, places)
        d = [goals[:, p] - values[:, p] for p in places]
        losses = torch.cat([(hessian @ each).mul_(each).sum(0) for each in d])
        for found in zip(values.split(width, 1), fitted.split(width), losses.split(width), strict=True):
            if best is None:
                best = found
                continue
            won = found[2] < best[2]
            values, fitted, loss = (torch.where(won, new, old) for new, old in zip(found, best, strict=True))
            best = values, fitted, loss
    assert best is not None
    return best[:2]


def compensate_site(
    weights: dict[str, Tensor],
    statistics: SiteStatistics,
    result: SiteResult,
    search: SearchRules,
    fixed: dict[str, FixedWeight] | None,
) -> None:
    """Put compensated values of every weight of a searched site into ``result.rounded``, where they beat plain rounding.

    With ``statistics.wanted`` they make up for what earlier layers did to the input too.

    Args:
        weights: (out, in) float32 of each operand. fixed: operands that are quantized already.
    """
    plan = result.input
    choice = None if plan is None else InputChoice(plan.spec, plan.scale, plan.shift, 0.0)
    if choice is not None:
        statistics.forget()  # the matrices of the rounded input take its place
    gram = statistics.quantized_gram(choice.quantize if choice else None, choice.unit if choice else None)
    by_format: dict[FloatFormat, list[str]] = {}
    for n in weights:
        if n not in (fixed or {}):
            by_format.setdefault(result.weights[n].format, []).append(n)
    errors = torch.zeros(2, dtype=torch.float64)  # of all operands, before and after
    for fmt, names in by_format.items():  # one pass over the columns for all operands of a format
        stacked = torch.cat([weights[n] for n in names]) if len(names) > 1 else weights[names[0]]
        scale = torch.cat([result.weights[n].scale for n in names])
        values, scale = compensated(stacked, gram, scale, fmt, search)
        start = 0
        for n in names:
            rows = slice(start, start + len(weights[n]))
            found = partial(site_losses, statistics=statistics, choice=choice, gram=None if few_tokens(statistics) else gram)
            counts = statistics.outputs(n)
            result.rounded[n], lost = _better_rows(weights[n], values[rows], scale[rows], result.weights[n], found, counts)
            errors += lost
            start = rows.stop
    if plan is not None and plan.error is not None and not fixed:
        plan.error *= float(errors[1] / errors[0].clamp_min(1e-30))


def _better_rows(
    weight: Tensor,
    values: Tensor,
    scale: Tensor,
    plan: WeightPlan,
    losses: Callable[[Tensor, Callable[[slice], Tensor]], Tensor],
    counts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the compensated rows, or the nearest levels for rows where these do less harm, and the (2,) errors of all rows before and
    after; update the plan."""
    nearest = fake_quantize(weight, plan.scale.unsqueeze(1), plan.format)
    before, after = (losses(weight, v.__getitem__) for v in (nearest, values))
    errors = [max(total(before, counts), 0.0), max(total(torch.minimum(before, after), counts), 0.0)]
    if plan.error is not None:
        plan.error *= errors[1] / max(errors[0], 1e-30)
    better = after <= before
    plan.scale = torch.where(better, scale, plan.scale)
    return torch.where(better.unsqueeze(1), values, nearest), torch.tensor(errors, dtype=torch.float64)
