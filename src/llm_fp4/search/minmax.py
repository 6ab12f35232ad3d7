"""Baselines without search: scales from the largest magnitude, one given format, with or without SmoothQuant."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_fp4.kernels.simulate import fake_quantize_input
from llm_fp4.numerics import fake_quantize, scale_of_max
from llm_fp4.plan import FixedWeight, InputPlan, InputSpec, SiteResult, WeightPlan
from llm_fp4.recipe import ModuleRule
from llm_fp4.statistics import SiteStatistics


def smoothing(channel_absmax: Tensor, weights: dict[str, Tensor], alpha: float = 0.5) -> Tensor:
    """Return the (in,) factor that divides the input and multiplies the weights; 1 for dead channels.

    ``max|X_j|**alpha / max|W_j|**(1 - alpha)``. Source: SmoothQuant, arXiv:2211.10438, Eq. 4.
    """
    weight_absmax = torch.stack([w.abs().amax(0) for w in weights.values()]).amax(0)
    factor = channel_absmax.pow(alpha) / weight_absmax.clamp_min(1e-5).pow(1 - alpha)
    return torch.where(channel_absmax == 0, torch.ones_like(factor), factor.clamp(1e-5, 1e5))


def minmax(
    name: str, weights: dict[str, Tensor], statistics: SiteStatistics, rules: dict[str, ModuleRule],
    *, per_token: bool, smooth: bool = False, fixed: dict[str, FixedWeight] | None = None,
) -> SiteResult:  # fmt: skip
    """Return the plan in which every largest magnitude is the largest value of the rule's first format.

    Args:
        weights: (out, in) float32 of each operand; with ``smooth``, each is multiplied by the plan's factor.
        fixed: operands whose weights are already quantized; they exclude smoothing.
    """
    rule = next(iter(rules.values()))
    fixed = fixed or {}
    factor = smoothing(statistics.channel_absmax, weights) if smooth and rule.input_formats and not fixed else None
    plans = {n: f.plan for n, f in fixed.items()}
    for n, w in weights.items():
        if n not in fixed:
            fmt = rules[n].weight_formats[0]
            plans[n] = WeightPlan(n, fmt, scale_of_max((w if factor is None else w * factor).abs().amax(1), fmt))
    if not rule.input_formats:
        return SiteResult(None, plans)
    fmt = rule.input_formats[0]
    top = (statistics.channel_absmax if factor is None else statistics.channel_absmax / factor).amax()
    scale = torch.ones_like(top) if per_token else scale_of_max(top, fmt)
    spec = InputSpec(fmt, "per_token" if per_token else "per_tensor", smooth=factor is not None)
    plan = InputPlan(name, list(weights), spec, scale, None, factor)
    plan.error = _relative_error(weights, plans, plan, statistics)
    return SiteResult(plan, plans)


def _relative_error(
    weights: dict[str, Tensor], plans: dict[str, WeightPlan], plan: InputPlan, statistics: SiteStatistics, tokens: int = 1024
) -> float:
    """Return the relative squared output error on a sample of tokens."""
    rows, row_weight = statistics.sample(tokens)
    rounded = fake_quantize_input(rows, plan.spec, plan.scale, plan.shift, plan.smooth)
    error = energy = 0.0
    for n, w in weights.items():
        target = rows @ w.t()
        source = w if plan.smooth is None else w * plan.smooth
        output = rounded @ fake_quantize(source, plans[n].scale.to(w.device).unsqueeze(1), plans[n].format).t()
        error += float(((output - target).square().sum(1) * row_weight).sum())
        energy += float((target.square().sum(1) * row_weight).sum())
    return error / max(energy, 1e-30)
