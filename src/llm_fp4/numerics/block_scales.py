"""Scales of blocks as they are stored: float16, E4M3 under one float32 a tensor, or E8M0, a power of two.

A stored scale is in the unit of the standards, in which E2M1 reaches 6 and E4M3 448: one step of a format is the scale times
the format's ``standard_step``. Sources: OCP Microscaling Formats 1.0 (E8M0, blocks of 32); NVIDIA's NVFP4 (E4M3, blocks
of 16, one float32 over them).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llm_fp4.numerics.formats import FloatFormat
from llm_fp4.numerics.granularity import PerBlock

_E4M3_MAX = 448.0  # 1.75 · 2^8: the code above it is NaN
_E8M0_BIAS = 127
_MAX = {"float16": 65504.0, "e4m3": _E4M3_MAX, "e8m0": 2.0**127}
# positive and finite; e8m0 from 2^-125, under which the step 2^-126 of E2M1 still has a finite reciprocal
_CODES = {"float16": (1, 0x7BFF), "e4m3": (1, 0x7E), "e8m0": (2, 254)}
_STRIDE = {"float16": 128, "e4m3": 1, "e8m0": 1}  # codes of a neighbour: an eighth of an octave, of an octave for e8m0


def store_scale(scale: Tensor, blocks: PerBlock) -> Tensor:
    """Return ``scale`` as the nearest one ``blocks`` can store, saturating; float16 and E4M3 reach 0.

    Returns:
        float16, float8_e4m3fn, or uint8 holding the exponent + 127 (E8M0).
    """
    scale = scale.float().clamp(0.0, _MAX[blocks.scale_dtype])
    if blocks.scale_dtype == "e8m0":
        low, high = _CODES["e8m0"]
        return (torch.log2(scale).round() + _E8M0_BIAS).clamp(low, high).to(torch.uint8)
    return scale.to(blocks.torch_dtype)


def scale_values(stored: Tensor) -> Tensor:
    """Return the float32 values of stored scales; a uint8 tensor is E8M0, whose code 255 is NaN."""
    if stored.dtype == torch.uint8:
        value = torch.exp2(stored.float() - _E8M0_BIAS)
        return torch.where(stored == 255, torch.full_like(value, math.nan), value)
    return stored.float()


def scale_bytes(stored: Tensor) -> Tensor:
    """Return stored one-byte scales as uint8, which every operation of torch takes; float16 as it is."""
    return stored.view(torch.uint8) if stored.dtype == torch.float8_e4m3fn else stored


def block_step(stored: Tensor, second: Tensor | None, fmt: FloatFormat) -> Tensor:
    """Return the float32 step of every block: scale, times the second scale where there is one, times the standard step.

    With a power of two as second scale no factor rounds, so values are exact products of level and scale.
    """
    step = scale_values(stored) * fmt.standard_step
    return step if second is None else step * second


def max_scale(absmax: Tensor, second: Tensor | None, fmt: FloatFormat, blocks: PerBlock) -> Tensor:
    """Return stored scales at which the largest magnitude is about the largest value, as engines take them.

    E4M3 and float16 round ``absmax / max`` to nearest, which is 0 for a block far below the tensor's range. E8M0 takes the
    power of two under ``absmax`` after rounding that to the format's mantissa, over the power of two under the largest
    value, so that it saturates by less than half a spacing.
    """
    if blocks.scale_dtype != "e8m0":
        top = absmax if second is None else absmax / second
        return store_scale(top / (fmt.max_level * fmt.standard_step), blocks)
    fraction, exponent = torch.frexp(absmax.float())  # fraction in [0.5, 1): 1.75 is 0.875
    # half a spacing below the next power of two belongs to it: 1 - 2^-(m + 2) for m mantissa bits
    exponent = exponent - 1 + (fraction >= 1 - 2.0 ** -(fmt.mantissa_bits + 2)).int()
    largest = math.floor(math.log2(fmt.max_level * fmt.standard_step))  # E2M1: 6 → 2
    code = (exponent - largest + _E8M0_BIAS).clamp(*_CODES["e8m0"])
    return torch.where(absmax == 0, torch.full_like(code, _E8M0_BIAS), code).to(torch.uint8)


def second_scale(absmax: Tensor, fmt: FloatFormat) -> Tensor:
    """Return the float32 power of two () under which the E4M3 scale of the block that holds ``absmax`` is near its largest.

    There is room for a block's largest magnitude to become two thirds of the largest value (4 instead of 6 in E2M1). As a
    power of two it and its reciprocal are exact, so engines that multiply and engines that divide read the same values.
    """
    ratio = absmax.double() * 1.5 / (fmt.max_level * fmt.standard_step * _E4M3_MAX)
    exponent = torch.log2(ratio.clamp_min(2.0**-60)).ceil()
    return torch.where(absmax == 0, torch.ones_like(exponent), torch.exp2(exponent)).float()


def neighbour(stored: Tensor, offset: Tensor | int, blocks: PerBlock) -> Tensor:
    """Return stored scales ``offset`` candidates away, positive ones: an eighth of an octave each, an octave for E8M0."""
    kind = blocks.scale_dtype
    code = stored.view(torch.int16 if kind == "float16" else torch.uint8).int()
    moved = (code + offset * _STRIDE[kind]).clamp(*_CODES[kind])
    if kind == "float16":
        return moved.to(torch.int16).view(torch.float16)
    return moved.to(torch.uint8).view(stored.dtype)
