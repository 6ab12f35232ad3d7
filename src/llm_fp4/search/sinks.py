"""Recognising input sites that attention-sink tokens dominate.

The first token of a sequence can be thousands of times larger than the others at some sites; one static scale
cannot span both.
"""

from __future__ import annotations

from torch import Tensor

from llm_fp4.recipe import ModuleRule, Recipe
from llm_fp4.statistics import SiteStatistics


def sink_ratio(token_absmax: Tensor) -> float:
    """Return the largest over the median token maximum; 1 for an all-zero input.

    Args:
        token_absmax: (tokens,) largest magnitude of each token.
    """
    median = float(token_absmax.median())
    top = float(token_absmax.max())
    return top / median if median > 0 else 1.0 if top == 0 else float("inf")


def scale_per_token(statistics: SiteStatistics, rule: ModuleRule, recipe: Recipe) -> tuple[bool, float]:
    """Return whether an input gets a scale per token, by its rule or for its sinks, and its sink ratio."""
    ratio = sink_ratio(statistics.token_absmax())
    found = recipe.inputs.sinks != "static" and ratio > recipe.inputs.sink_ratio
    return rule.granularity == "per_token" or found, ratio
