"""Keys and values of one attention as packed codes: static steps for each channel of a key, a step for each token of a value."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from llm_fp4.nn.kept import KeepsDtypes
from llm_fp4.numerics import SMALLEST_STEP, FloatFormat, decode, encode, pack, unpack
from llm_fp4.plan import CACHE_TENSORS, CachePlan, CacheSpec

CACHE = "cache_codes"  # the name of the module that holds the scales, inside the attention module
CACHE_STEP = torch.bfloat16  # of a value's step: any float32 step fits its range, and the codes are made for it as stored


class CacheCodes(KeepsDtypes):
    """Encodes and decodes (batch, heads, tokens, channels) keys and values of the attention it lives in.

    Attributes:
        beyond: the squared steps of all keys seen, and what of them lay beyond the largest value, while someone counts; otherwise None.
        used: whether the attention puts its codes into caches already.
    """

    kept = CACHE_TENSORS
    key_scale: Tensor
    value_ratio: Tensor

    def __init__(self, spec: CacheSpec, device: Any = None) -> None:
        super().__init__()
        self.spec = spec
        self.beyond: list[float] | None = None
        self.used = False
        for name, shape in spec.shapes.items():
            self.register_buffer(name, torch.ones(shape, dtype=torch.float32, device=device))

    @classmethod
    def from_plan(cls, plan: CachePlan) -> CacheCodes:
        """Return the module of a decision."""
        codes = cls(plan.spec)
        codes.key_scale, codes.value_ratio = plan.key_scale.clone(), plan.value_ratio.clone()
        return codes

    def encode_keys(self, keys: Tensor) -> Tensor:
        """Return the (batch, heads, tokens, bytes) uint8 codes of ``keys``.

        Raises:
            NonFiniteError: they hold NaN or infinity.
        """
        steps = keys.float() * (1.0 / self.key_scale)
        if self.beyond is not None:
            self.beyond[0] += float(steps.square().sum())
            self.beyond[1] += float((steps.abs() - self.spec.key.max_level).clamp_(min=0).square_().sum())
        return pack(encode(steps, self.spec.key, "a key"), self.spec.key.bits)

    def decode_keys(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the keys of ``codes``."""
        return _levels_of(codes, self.spec.key, self.spec.key_size).mul_(self.key_scale).to(dtype)

    def encode_values(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the uint8 codes of ``values`` and their (batch, heads, tokens, 1) bfloat16 steps.

        Raises:
            NonFiniteError: they hold NaN or infinity.
        """
        top = values.float().abs().amax(-1, keepdim=True)
        step = (top * (self.value_ratio / self.spec.value.max_level)).clamp_(min=SMALLEST_STEP)
        step = torch.where(top == 0, torch.ones_like(step), step).to(CACHE_STEP)
        return pack(encode(values.float() / step.float(), self.spec.value, "a value"), self.spec.value.bits), step

    def decode_values(self, codes: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the values of ``codes``."""
        return _levels_of(codes, self.spec.value, self.spec.value_size).mul_(step.float()).to(dtype)

    def extra_repr(self) -> str:
        return ", ".join(f"{n}={v}" for n, v in self.spec.to_json().items())


@lru_cache
def _table(fmt: FloatFormat, device: torch.device) -> Tensor:
    """Return the (256, 8 / bits) float32 levels of the codes in every byte."""
    every = torch.arange(256, device=device, dtype=torch.int32).to(torch.uint8)
    return decode(unpack(every[:, None], fmt.bits, 8 // fmt.bits), fmt)


def _levels_of(packed: Tensor, fmt: FloatFormat, columns: int) -> Tensor:
    """Return the (..., columns) float32 levels of packed codes, which is what decoding a long cache spends its time on."""
    if 8 % fmt.bits:
        return decode(unpack(packed, fmt.bits, columns), fmt)
    pairs = nn.functional.embedding(packed.int(), _table(fmt, packed.device))
    levels = pairs.flatten(-2)
    return levels if levels.shape[-1] == columns else levels[..., :columns].contiguous()
