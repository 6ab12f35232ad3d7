"""What the search decided: plans of input sites, weights, attention products, the cache of keys and values, the prefix."""

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
from llm_fp4.plan.prefix import PREFIX_TENSORS, PrefixSpec

__all__ = [
    "ATTENTION_INPUTS", "CACHE_TENSORS", "LIMB", "PREFIX_TENSORS", "TWO_LIMBS", "AttentionSpec", "CachePlan", "CacheSpec", "FixedWeight",
    "InputPlan", "InputSpec", "PrefixSpec", "ProductPlan", "SiteResult", "WeightPlan",
]  # fmt: skip
