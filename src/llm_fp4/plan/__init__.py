"""What the search decided: plans of input sites, weights, attention products and the cache of keys and values."""

from llm_fp4.plan.cache import CACHE_TENSORS, CachePlan, CacheSpec
from llm_fp4.plan.decisions import (
    ATTENTION_INPUTS,
    LIMB,
    TWO_LIMBS,
    AttentionSpec,
    FixedWeight,
    InputPlan,
    InputSpec,
    ProductPlan,
    SiteResult,
    WeightPlan,
)

__all__ = [
    "ATTENTION_INPUTS", "CACHE_TENSORS", "LIMB", "TWO_LIMBS", "AttentionSpec", "CachePlan", "CacheSpec", "FixedWeight", "InputPlan",
    "InputSpec", "ProductPlan", "SiteResult", "WeightPlan",
]  # fmt: skip
