"""A prefix of a few tokens that one attention sees before every sequence: their keys and values, made once by the float model.

The prefix stands at positions -tokens ... -1, so that nothing else need know of it: positions, masks, lengths and caches are those of
the sequence alone. It takes the part of the attention sink, and no token of the sequence has to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llm_fp4.errors import CheckpointError, UnsupportedError
from llm_fp4.nn.kept import KeepsDtypes
from llm_fp4.plan import PREFIX_TENSORS, PrefixSpec

PREFIX = "attention_prefix"  # the name of the module that holds the states, inside the attention module
PREFIXED = ("llm_fp4", "llm_fp4_sdpa")  # the attention implementations that see it

_PICKED = ("indices", "block_indices")  # as sparse attention passes them to all but its own implementations

KeyListener = Callable[[nn.Module, Tensor, Tensor], None]
"""Told of every attention: its module, and the (batch, heads, tokens, channels) keys and values of the sequence."""
_listeners: list[KeyListener] = []


class AttentionPrefix(KeepsDtypes):
    """The float32 keys and values of the prefix; lives inside the attention module."""

    kept = PREFIX_TENSORS
    prefix_key: Tensor
    prefix_value: Tensor

    def __init__(self, spec: PrefixSpec, device: Any = None) -> None:
        super().__init__()
        self.spec = spec
        for name, shape in spec.shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32, device=device))

    @classmethod
    def of(cls, key: Tensor, value: Tensor) -> AttentionPrefix:
        """Return the prefix of (heads, tokens, channels) keys and values."""
        made = cls(PrefixSpec(key.shape[1], key.shape[0], key.shape[2], value.shape[2]))
        made.prefix_key, made.prefix_value = key.detach().float().clone(), value.detach().float().clone()
        return made

    def extra_repr(self) -> str:
        return f"tokens={self.spec.tokens}"


def place_prefix(module: nn.Module, prefix: AttentionPrefix) -> None:
    """Let the attention ``module`` see ``prefix`` from now on; it refuses to run where it would not."""
    if PREFIX not in module._modules:
        module.register_forward_pre_hook(_check_routed)
    module.add_module(PREFIX, prefix)


def _check_routed(module: nn.Module, args: Any) -> None:
    """Raise UnsupportedError where the module's attention goes another way than past its prefix."""
    way = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if PREFIX in module._modules and way not in PREFIXED:
        raise UnsupportedError(
            f"this checkpoint's attention sees a prefix of {prefix_length(module)} tokens, which attn_implementation {way!r} would leave out; "
            f"set {PREFIXED[0]!r} or {PREFIXED[1]!r}"
        )


def prefix_length(module: nn.Module) -> int:
    """Return how many tokens of a prefix the attention ``module`` sees."""
    prefix = module._modules.get(PREFIX)
    return prefix.spec.tokens if isinstance(prefix, AttentionPrefix) else 0


def prefixed(
    attention: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Any:  # fmt: skip
    """Return what ``attention`` gives for ``module`` with its prefix before the keys and values.

    Args:
        query: (batch, heads, rows, channels). key, value: (batch, kv heads, columns, channels).
        attention_mask: (batch or 1, heads or 1, rows, columns), additive or boolean; None: every query sees every key.
    Returns:
        The attention's own result; weights, where it gives them, have a column for each token of the prefix first.
    Raises:
        UnsupportedError: the mask is of another kind, or the model adds a bias by position or picks the keys that a query sees.
        CheckpointError: the prefix is of other heads than the keys.
    """
    if any(kwargs.get(name) is not None for name in _PICKED):
        raise UnsupportedError(f"{type(module).__name__} picks the keys that a query sees, which llm-fp4's attention would not")
    for listener in _listeners:
        listener(module, key, value)
    prefix = module._modules.get(PREFIX)
    if not isinstance(prefix, AttentionPrefix):
        return attention(module, query, key, value, attention_mask, *args, **kwargs)
    if kwargs.get("position_bias") is not None:
        raise UnsupportedError(f"{type(module).__name__} adds a bias by position, which the prefix of its checkpoint has none of")
    mask = None if attention_mask is None else _seen_first(attention_mask, prefix.spec.tokens, module)
    batch, spec = key.shape[0], prefix.spec
    if (key.shape[1], key.shape[3], value.shape[3]) != (spec.heads, spec.key_size, spec.value_size):
        raise CheckpointError(
            f"the checkpoint's prefix has {spec.heads} heads of {spec.key_size} channels, its attention {key.shape[1]} of {key.shape[3]}; "
            "they do not belong together"
        )
    key = torch.cat((prefix.prefix_key.to(key.dtype).expand(batch, -1, -1, -1), key), 2)
    value = torch.cat((prefix.prefix_value.to(value.dtype).expand(batch, -1, -1, -1), value), 2)
    return attention(module, query, key, value, mask, *args, **kwargs)


def unsaid_mask(module: nn.Module, query: Tensor, key: Tensor, is_causal: bool | None) -> Tensor | None:
    """Return the mask that fused attention without one stands for; None where every query sees every key."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal or query.shape[2] == 1:
        return None
    return torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril_()[None, None]


def _seen_first(mask: Tensor, tokens: int, module: nn.Module) -> Tensor:
    """Return ``mask`` with ``tokens`` more columns first, which every query sees."""
    if mask.dim() != 4:
        raise UnsupportedError(f"{type(module).__name__} masks by a tensor of {mask.dim()} axes, in which its prefix has no place")
    return nn.functional.pad(mask, (tokens, 0), value=1.0 if mask.dtype == torch.bool else 0.0)


@contextmanager
def hearing_keys(listener: KeyListener) -> Iterator[None]:
    """Tell ``listener`` of the keys and values of every attention while the block holds."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
