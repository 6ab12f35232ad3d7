"""Two attention implementations in transformers' registries, which put a module's prefix before its keys and values where it has one.

"llm_fp4" is the model's own attention with its products quantized, "llm_fp4_sdpa" is torch's fused one. Both registries know them: an
attention function without its mask twin would silently run without any mask.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from llm_fp4.errors import UnsupportedError
from llm_fp4.nn import PREFIXED, attend, prefix_length, prefixed, unsaid_mask

IMPLEMENTATION, FUSED = PREFIXED


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
    return prefixed(partial(attend, own_attention(module)), module, *args, **kwargs)


def fused_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Any:
    """Return the output of torch's fused attention."""
    if attention_mask is None and prefix_length(module):
        attention_mask = unsaid_mask(module, query, key, kwargs.get("is_causal"))
    return prefixed(sdpa_attention_forward, module, query, key, value, attention_mask, *args, **kwargs)


def explicit_mask(*args: Any, **kwargs: Any) -> Any:
    """Return the boolean mask of fused attention, made even where fused attention could do without: the prefix goes before it."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


def use_quantized_attention(model: Any) -> bool:
    """Let every attention of ``model`` run through :func:`quantized_attention`; return whether it has that seam."""
    return _use(model, IMPLEMENTATION)


def use_prefixed_attention(model: Any) -> bool:
    """Let every attention of ``model`` see its prefix, fused where it was fused; return whether it has that seam."""
    now = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return now in PREFIXED or _use(model, FUSED if now == "sdpa" else IMPLEMENTATION)


def _use(model: Any, implementation: str) -> bool:
    if not hasattr(model, "set_attn_implementation"):
        return False
    model.set_attn_implementation(implementation)
    configs = {
        id(m.config): m.config for m in model.modules() if hasattr(m, "config") and hasattr(m.config, "_attn_implementation")
    }
    return any(c._attn_implementation == implementation for c in configs.values())


AttentionInterface.register(IMPLEMENTATION, quantized_attention)
AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)
AttentionInterface.register(FUSED, fused_attention)
AttentionMaskInterface.register(FUSED, explicit_mask)
