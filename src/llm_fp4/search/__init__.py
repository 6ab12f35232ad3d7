"""Search: (weights of an input site, statistics, rules) to plans. Sees no model."""

from __future__ import annotations

from torch import Tensor

from llm_fp4.kernels.simulate import beyond
from llm_fp4.plan import FixedWeight, InputPlan, SiteResult
from llm_fp4.recipe import ModuleRule, Recipe
from llm_fp4.search.allocation import Chosen, Part, allocate, solver, spent
from llm_fp4.search.blocks import search_blocks
from llm_fp4.search.cache import search_cache
from llm_fp4.search.compensation import compensate_site
from llm_fp4.search.descent import descend
from llm_fp4.search.embedding import embedding_plan
from llm_fp4.search.minmax import minmax
from llm_fp4.search.products import ProductSample, search_product
from llm_fp4.search.quick import quick_input, quick_table, quick_weight
from llm_fp4.search.sinks import scale_per_token, sink_ratio
from llm_fp4.statistics import SiteStatistics

__all__ = [
    "Chosen", "Part", "ProductSample", "allocate", "embedding_plan", "quick_input", "quick_table", "quick_weight", "search_cache", "search_product",
    "search_site", "sink_ratio", "solver", "spent",
]  # fmt: skip


def search_site(
    name: str, weights: dict[str, Tensor], statistics: SiteStatistics, rules: dict[str, ModuleRule], recipe: Recipe,
    fixed: dict[str, FixedWeight] | None = None,
) -> SiteResult:  # fmt: skip
    """Return the plan of one input site by the recipe's method.

    Args:
        name: the site. weights: (out, in) float32 of every operand. rules: what holds for every operand.
        fixed: operands whose weight is decided already.
    Raises:
        NonFiniteError: the calibration input holds NaN or infinity.
    """
    statistics.check()
    rule = next(iter(rules.values()))
    if rule.weight_blocks is not None and rule.weight_formats:
        return search_blocks(name, weights, statistics, rules, recipe)
    per_token, ratio = scale_per_token(statistics, rule, recipe) if rule.input_formats else (False, None)
    reason = ""
    if per_token and rule.granularity != "per_token":
        reason = f"scale per token: the largest token is {ratio:.0f} times the median, which one static scale cannot span"
    if recipe.method in ("minmax", "smoothquant"):
        smooth = recipe.method == "smoothquant"
        result = minmax(name, weights, statistics, rules, per_token=per_token, smooth=smooth, fixed=fixed)
    else:
        result = descend(name, weights, statistics, rules, recipe.search, per_token=per_token, fixed=fixed)
        if recipe.search.compensation == "gptq":
            compensate_site(weights, statistics, result, recipe.search, fixed)
    result.rounded |= {n: f.values for n, f in (fixed or {}).items()}
    if result.input is not None:
        result.input.sink_ratio, result.input.reason = ratio, reason
        result.input.clipped = _clipped(result.input, statistics, recipe.search.sample_tokens)
    return result


def _clipped(plan: InputPlan, statistics: SiteStatistics, count: int) -> float | None:
    """Return the share of a sample's values that a static scale clips; None for scales made as the input arrives."""
    if plan.spec.granularity != "per_tensor":
        return None
    rows, weight = statistics.sample(count)
    wide = beyond(rows, plan.spec, plan.scale, plan.shift, plan.smooth).float().mean(1)
    return float((wide * weight).sum() / weight.sum())
