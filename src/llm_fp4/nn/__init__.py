"""Quantized layers, and their exchange for float ones by name."""

from llm_fp4.nn.embedding import QuantEmbedding
from llm_fp4.nn.linear import PackedModule, QuantLinear
from llm_fp4.nn.replace import borrow_weight, replace_module, share_inputs, share_weight

__all__ = ["PackedModule", "QuantEmbedding", "QuantLinear", "borrow_weight", "replace_module", "share_inputs", "share_weight"]
