"""Quantized layers, and their exchange for float ones by name."""

from llm_fp4.nn.apart import forget_wholes, put_together
from llm_fp4.nn.attention import CHILD, AttentionProducts, attend, listening, watching
from llm_fp4.nn.cache import CACHE, CACHE_STEP, CacheCodes
from llm_fp4.nn.embedding import QuantEmbedding
from llm_fp4.nn.experts import ExpertList, expert_lists, fused_experts, take_apart
from llm_fp4.nn.linear import PackedModule, QuantLinear
from llm_fp4.nn.linears import is_linear, is_transposed, linear_shape, linear_weight
from llm_fp4.nn.patches import PatchLinear, patch_embeddings, separate_patches
from llm_fp4.nn.prefix import PREFIX, PREFIXED, AttentionPrefix, hearing_keys, place_prefix, prefix_length, prefixed, unsaid_mask
from llm_fp4.nn.replace import borrow_weight, replace_module, share_inputs, share_weight

__all__ = [
    "CACHE", "CACHE_STEP", "CHILD", "PREFIX", "PREFIXED", "AttentionPrefix", "AttentionProducts", "CacheCodes", "ExpertList", "PackedModule",
    "PatchLinear", "QuantEmbedding", "QuantLinear", "attend", "borrow_weight", "expert_lists", "forget_wholes", "fused_experts", "hearing_keys",
    "is_linear", "is_transposed", "linear_shape", "linear_weight", "listening", "patch_embeddings", "place_prefix", "prefix_length", "prefixed",
    "put_together", "replace_module", "separate_patches", "share_inputs", "share_weight", "take_apart", "unsaid_mask", "watching",
]  # fmt: skip
