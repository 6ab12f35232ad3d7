"""The attention implementation "llm_fp4" in transformers' registries: the model's own attention, its products quantized.

Both registries know it. An attention function without its mask twin would silently run without any mask.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from llm_fp4.errors import UnsupportedError
from llm_fp4.nn import attend

IMPLEMENTATION = "llm_fp4"


def own_attention(module: nn.Module) -> Callable[..., Any]:
    """Return the attention function written beside the class of ``module`` or of its bases.

    Raises:
        UnsupportedError: there is none.
    """
    for kind in type(module).__mro__:
        found = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if found is not None:
            function: Callable[..., Any] = found
            return function
    raise UnsupportedError(
        f"{type(module).__name__} has no attention function of its own, so its products stay in float; leave out --attention"
    )


def quantized_attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Return the output of the module's own attention function with its products quantized."""
    return attend(own_attention(module), module, *args, **kwargs)


def use_quantized_attention(model: Any) -> bool:
    """Let every attention of ``model`` run through :func:`quantized_attention`; return whether it has that seam."""
    if not hasattr(model, "set_attn_implementation"):
        return False
    model.set_attn_implementation(IMPLEMENTATION)
    configs = {
        id(m.config): m.config for m in model.modules() if hasattr(m, "config") and hasattr(m.config, "_attn_implementation")
    }
    return any(c._attn_implementation == IMPLEMENTATION for c in configs.values())


AttentionInterface.register(IMPLEMENTATION, quantized_attention)
AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)
