"""transformers' cache of a decoder with quantized keys and values: each attention puts its own layer into any cache it is handed.

The attention module owns the scales, so whoever makes the cache (``generate``, the model's forward, the user) need know nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from llm_fp4.errors import UnsupportedError
from llm_fp4.nn import CACHE, CacheCodes

FLUSH = 16  # tokens that become codes at once: less work a token than one by one


class PackedLayer(DynamicLayer):
    """Keys and values of one attention: the first tokens and the newest in float, packed codes between them.

    What a call brings is read as it came; what lay here before, as it lies here. ``keys`` and ``values`` are the newest tokens:
    between ``window`` and ``window + FLUSH - 1`` of them, as far as there are so many.
    """

    _NAMES = ("keys", "values", "sink_keys", "sink_values", "key_codes", "value_codes", "value_steps")
    keys: Any
    values: Any
    sink_keys: Any
    sink_values: Any
    key_codes: Any
    value_codes: Any
    value_steps: Any

    def __init__(self, codes: CacheCodes) -> None:
        super().__init__()
        self.codes = codes
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.is_initialized = False
        for name in self._NAMES:
            setattr(self, name, None)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Make everything empty, shaped after the first states.

        Raises:
            UnsupportedError: they are of another shape than those the scales were made for.
        """
        spec, values = self.codes.spec, key_states if value_states is None else value_states
        found = (key_states.shape[1], key_states.shape[3], values.shape[3])
        if found != (spec.heads, spec.key_size, spec.value_size):
            raise UnsupportedError(
                f"the model caches {found[0]} heads of {found[1]} and {found[2]} channels, its checkpoint has scales for {spec.heads} of "
                f"{spec.key_size} and {spec.value_size}; use the version of transformers that quantized it"
            )
        self.device, self.dtype = key_states.device, key_states.dtype
        self.keys, self.values = key_states[:, :, :0], values[:, :, :0]
        self.sink_keys, self.sink_values = self.keys, self.values
        self.key_codes = self.codes.encode_keys(self.keys)
        self.value_codes, self.value_steps = self.codes.encode_values(self.values)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep (batch, heads, tokens, channels) states and return those of all tokens, the kept ones as they are held."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new_keys, new_values = torch.cat((self.keys, key_states), -2), torch.cat((self.values, value_states), -2)
        keys, values = self._with_past(new_keys, new_values)
        self._keep(new_keys, new_values)
        return keys, values

    def _with_past(self, new_keys: Tensor, new_values: Tensor) -> tuple[Tensor, Tensor]:
        if not self.key_codes.shape[-2] and not self.sink_keys.shape[-2]:
            return new_keys, new_values
        old_keys = self.codes.decode_keys(self.key_codes, new_keys.dtype)
        old_values = self.codes.decode_values(self.value_codes, self.value_steps, new_values.dtype)
        return torch.cat((self.sink_keys, old_keys, new_keys), -2), torch.cat((self.sink_values, old_values, new_values), -2)

    def _keep(self, keys: Tensor, values: Tensor) -> None:
        """Take (newest) float states over, the oldest of them as codes."""
        spec = self.codes.spec
        if (room := spec.sinks - self.sink_keys.shape[-2]) > 0 and not self.key_codes.shape[-2]:
            self.sink_keys = torch.cat((self.sink_keys, keys[:, :, :room]), -2)
            self.sink_values = torch.cat((self.sink_values, values[:, :, :room]), -2)
            keys, values = keys[:, :, room:], values[:, :, room:]
        old = keys.shape[-2] - spec.window
        if old >= FLUSH:
            codes, steps = self.codes.encode_values(values[:, :, :old])
            self.key_codes = torch.cat((self.key_codes, self.codes.encode_keys(keys[:, :, :old])), -2)
            self.value_codes = torch.cat((self.value_codes, codes), -2)
            self.value_steps = torch.cat((self.value_steps, steps), -2)
            keys, values = keys[:, :, old:], values[:, :, old:]
        self.keys, self.values = keys.clone(), values.clone()  # a view would hold the whole prompt

    def get_seq_length(self) -> int:
        """Return how many tokens are kept."""
        if not self.is_initialized:
            return 0
        return int(self.sink_keys.shape[-2] + self.key_codes.shape[-2] + self.keys.shape[-2])

    @property
    def nbytes(self) -> int:
        """The memory of all that is kept."""
        return sum(t.nbytes for t in self._tensors()) if self.is_initialized else 0

    # --- what generation does to a cache ---------------------------------------------------------------

    def _tensors(self) -> Iterator[Tensor]:
        return (getattr(self, n) for n in self._NAMES)

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        for name in self._NAMES if self.is_initialized else ():
            setattr(self, name, fn(getattr(self, name)))

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move everything back to the device it came from."""
        self._map(lambda t: t.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the sequences of a batch in another order."""
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences of a batch."""
        self._map(lambda t: t[indices, ...])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest ``-tokens_to_remove`` tokens; a positive number is the length to crop to, as older versions have it."""
        length = self.get_seq_length()
        left = length + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, length)
        parts = (("keys", "values"), ("key_codes", "value_codes", "value_steps"), ("sink_keys", "sink_values"))
        remove = max(0, length - max(left, 0))
        for names in parts if remove else ():
            have = getattr(self, names[0]).shape[-2]
            here = min(remove, have)
            for name in names:
                setattr(self, name, getattr(self, name)[:, :, : have - here].clone())
            remove -= here


def keep_in_codes(model: nn.Module) -> None:
    """Let every attention of ``model`` that has scales for it hold its keys and values as packed codes from now on."""
    for name, module in model.named_modules():
        codes = module._modules.get(CACHE)
        if isinstance(codes, CacheCodes) and not codes.used:
            module.register_forward_pre_hook(partial(_take_over, name), with_kwargs=True)
            codes.used = True


def _take_over(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Put a packed layer into the cache that the attention ``name`` is called with, if that still has one of transformers' own.

    Raises:
        UnsupportedError: the cache is of another kind than a growing one.
    """
    cache = next((v for v in (*kwargs.values(), *args) if isinstance(v, Cache | EncoderDecoderCache)), None)
    if cache is None:
        return
    if isinstance(cache, EncoderDecoderCache):  # the encoder's states stay in float: they do not grow
        cache = cache.self_attention_cache
    index, codes = module.layer_idx, module._modules[CACHE]
    assert isinstance(index, int)
    assert isinstance(codes, CacheCodes)
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if isinstance(layer, PackedLayer):
        return
    if type(layer) is not DynamicLayer:
        raise UnsupportedError(
            f"{name} keeps keys and values in codes, which a {type(layer).__name__} cannot hold; "
            "leave cache_implementation out, or pass a DynamicCache"
        )
    packed = PackedLayer(codes)
    if layer.get_seq_length():  # filled before, in float
        packed.update(layer.keys, layer.values)
    cache.layers[index] = packed


def cache_bytes(cache: Any) -> int:
    """Return the memory that the keys and values of a cache take, in bytes."""
    if isinstance(cache, EncoderDecoderCache):
        return cache_bytes(cache.self_attention_cache) + cache_bytes(cache.cross_attention_cache)
    return sum(layer.nbytes if isinstance(layer, PackedLayer) else _float_bytes(layer) for layer in cache.layers)


def _float_bytes(layer: Any) -> int:
    return sum(t.nbytes for t in (layer.keys, layer.values) if isinstance(t, Tensor))
