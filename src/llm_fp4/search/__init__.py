"""Search: (weights of an input site, statistics, rules) to plans. Sees no model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from llm_fp4.errors import CalibrationError
from llm_fp4.kernels.simulate import beyond
from llm_fp4.plan import FixedWeight, InputPlan, SiteResult
from llm_fp4.recipe import ModuleRule, Recipe
from llm_fp4.search.allocation import Chosen, Part, allocate, solver, spent
from llm_fp4.search.blocks import search_blocks
from llm_fp4.search.cache import search_cache
from llm_fp4.search.compensation import compensate_site
from llm_fp4.search.descent import descend, grids
from llm_fp4.search.embedding import embedding_plan
from llm_fp4.search.factor import SingularError
from llm_fp4.search.minmax import minmax
from llm_fp4.search.offsets import choose_variant, folded_biases, variants
from llm_fp4.search.products import ProductSample, search_product
from llm_fp4.search.quick import quick_input, quick_table, quick_weight
from llm_fp4.search.sinks import scale_per_token, sink_ratio
from llm_fp4.statistics import FloatRows, SiteStatistics

__all__ = [
    "Chosen", "Part", "ProductSample", "allocate", "embedding_plan", "quick_input", "quick_table", "quick_weight", "search_cache", "search_product",
    "search_site", "sink_ratio", "solver", "spent",
]  # fmt: skip


def search_site(
    name: str, weights: dict[str, Tensor], statistics: SiteStatistics, rules: dict[str, ModuleRule], recipe: Recipe,
    fixed: dict[str, FixedWeight] | None = None, wanted: FloatRows | None = None,
) -> SiteResult:  # fmt: skip
    """Return the plan of one input site by the recipe's method.

    Args:
        name: the site. weights: (out, in) float32 of every operand. rules: what holds for every operand.
        fixed: operands whose weight is decided already. wanted: the float model's rows, for the error compensation.
    Raises:
        NonFiniteError: the calibration input holds NaN or infinity. CalibrationError: error compensation needs more damping.
    """
    statistics.check()
    rule, search = next(iter(rules.values())), recipe.searched
    blocks = rule.weight_blocks is not None and bool(rule.weight_formats)
    correct = search is not None and search.bias_correction
    statistics = replace(statistics, centered=True) if correct else statistics
    per_token, ratio = scale_per_token(statistics, rule, recipe) if rule.input_formats and not blocks else (False, None)
    reason, chosen, why = "", None, ""
    if per_token and rule.granularity != "per_token":
        reason = f"scale per token: the largest token is {ratio:.0f} times the median, which one static scale cannot span"
    if search is not None and rule.input_formats:
        found = variants(statistics, rule, recipe.inputs)
        chosen, why = choose_variant(found, weights, statistics, rules, grids(search)[1], search.sample_tokens, per_token=per_token)
        rules = {n: r.model_copy(update={"input_formats": chosen.formats}) for n, r in rules.items()}
    offset = None if chosen is None else chosen.offset
    read = statistics.minus(offset)
    with _told(name, recipe):
        if blocks:
            result = search_blocks(name, weights, read, rules, recipe, wanted)
        elif search is None:
            smooth = recipe.method == "smoothquant"
            result = minmax(name, weights, read, rules, per_token=per_token, smooth=smooth, fixed=fixed)
        else:
            result = descend(name, weights, read, rules, search, per_token=per_token, fixed=fixed)
            if search.compensation != "none":
                compensate_site(weights, replace(read, wanted=wanted), result, search, fixed)
    if not blocks:
        result.rounded |= {n: f.values for n, f in (fixed or {}).items()}
    result.bias = folded_biases(weights, replace(read, wanted=wanted), result, offset, correct)
    reason = "; ".join(r for r in (reason, why) if r)
    if result.input is not None:
        if offset is not None:
            result.input.spec, result.input.offset = replace(result.input.spec, offset=True), offset
        result.input.sink_ratio, result.input.reason = ratio, reason
        result.input.clipped = _clipped(result.input, read, recipe.search.sample_tokens)
    return result


@contextmanager
def _told(name: str, recipe: Recipe) -> Iterator[None]:
    """Say in a sentence that a site's products have no triangular factor."""
    try:
        yield
    except SingularError:
        raise CalibrationError(
            f"{name}: the products of its calibration input are singular to float precision under search.damping "
            f"{recipe.search.damping:g}, so errors cannot be compensated; raise the damping"
        ) from None


def _clipped(plan: InputPlan, statistics: SiteStatistics, count: int) -> float | None:
    """Return the share of a sample's values that a static scale clips; None for scales made as the input arrives."""
    if plan.spec.granularity != "per_tensor":
        return None
    rows, weight = statistics.sample(count)
    wide = beyond(rows, plan.spec, plan.scale, plan.shift, plan.smooth).float().mean(1)
    return float((wide * weight).sum() / weight.sum())
