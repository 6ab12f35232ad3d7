"""What transformers keeps of the past in each layer of a model, and running a text through it piece by piece."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn


def kept_whole(model: nn.Module) -> list[bool] | None:
    """Return, for each layer with a cache, whether it keeps every token's key and value; None where nothing says so.

    Others keep a sliding window, a state of linear attention, or share another layer's keys.
    """
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return None
    from transformers.cache_utils import DynamicCache, DynamicLayer

    try:
        layers = DynamicCache(config=config).layers
    except (AttributeError, KeyError, TypeError, ValueError):  # a configuration of another kind, as an image encoder's
        return None
    return [type(layer) is DynamicLayer for layer in layers]


def continued(model: Any, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Return the (batch, tokens, vocabulary) logits of the next ``ids`` of a text, and the cache that now holds them too.

    Args:
        cache: what the call before returned; None at the beginning.
    """
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # its older name
    out = model(input_ids=ids, use_cache=True, **{name: cache})
    return out.logits, getattr(out, name)
