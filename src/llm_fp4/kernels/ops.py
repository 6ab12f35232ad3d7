"""The operations a quantized layer runs, as torch.library ops; the bodies here are the reference.

Kernels override these bodies for a device and must agree bit for bit in the integers and to one rounding
in the float epilogue. All take packed weights; none keeps an expanded copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_fp4.errors import UnsupportedError
from llm_fp4.kernels.hadamard import hadamard
from llm_fp4.numerics import SMALLEST_STEP, FloatFormat, decode, int8_product, round_to_level, unpack
from llm_fp4.plan import LIMB, TWO_LIMBS


def input_multiplier(scale: Tensor, shift: Tensor | None, smooth: Tensor | None) -> Tensor:
    """Return what ``x`` is multiplied by before rounding: 1/scale, times 2^shift (exact), over smooth."""
    inverse = 1.0 / scale
    if smooth is not None:
        inverse = inverse * (1.0 / smooth)
    return inverse if shift is None else inverse * torch.exp2(shift.float())


def token_scale(x: Tensor, ratio: Tensor, shift: Tensor | None, smooth: Tensor | None, max_level: int) -> Tensor:
    """Return the (tokens, 1) step of each row of (tokens, in) float32 ``x``; 1 for an all-zero row.

    It is the largest shifted magnitude of the row times ``ratio`` (), over the largest level.
    """
    shifted = x.abs()
    if shift is not None or smooth is not None:
        shifted = shifted * input_multiplier(torch.ones_like(ratio), shift, smooth)
    top = shifted.amax(-1, keepdim=True) if x.shape[-1] else shifted.new_zeros((len(x), 1))
    step = (top * (ratio / max_level)).clamp_(min=SMALLEST_STEP)
    return torch.where(top == 0, torch.ones_like(step), step)


def check_limbs(fmt: FloatFormat, max_shift: int) -> None:
    """Raise UnsupportedError where two int8 limbs do not hold the shifted levels."""
    if fmt.max_level << max_shift > TWO_LIMBS:
        raise UnsupportedError(
            f"{fmt} inputs with shifts up to {max_shift} reach {fmt.max_level << max_shift}, beyond the {TWO_LIMBS} of two int8 limbs; "
            "run them in float or lower max_shift"
        )


def empty_levels(
    x: Tensor, exponent_bits: int, mantissa_bits: int, signed: bool, max_shift: int, _per_token: bool, _transform: bool = False
) -> tuple[Tensor, Tensor]:
    """Return levels and steps in the shapes and types of :func:`quantize_input_reference`, for tracing."""
    top = FloatFormat(exponent_bits, mantissa_bits, signed).max_level << max_shift
    levels = torch.empty_like(x, dtype=torch.int8 if top <= LIMB else torch.int16, memory_format=torch.contiguous_format)
    return levels, x.new_empty((x.shape[0], 1), dtype=torch.float32)


def empty_product(x: Tensor, weight_packed: Tensor, *_: object) -> Tensor:
    """Return the (tokens, out) float32 that a product fills, for tracing; its other operands shape nothing."""
    return x.new_empty((x.shape[0], weight_packed.shape[0]), dtype=torch.float32)


def quantize_input_reference(
    x: Tensor, scale: Tensor, shift: Tensor | None, smooth: Tensor | None,
    exponent_bits: int, mantissa_bits: int, signed: bool, max_shift: int, per_token: bool, transform: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the integers of an input and the float32 step they are in.

    Args:
        x: (tokens, in) float32 or bfloat16.
        scale: () float32, the static step, or the clipping ratio where ``per_token``.
        shift: (in,) uint8 up to ``max_shift``, or None. smooth: (in,) float32, or None.
        transform: whether rows pass :func:`llm_fp4.kernels.hadamard.hadamard` first, in the same pass over them.
    Returns:
        levels: (tokens, in) ``level * 2**(max_shift - shift)``: int8 where it fits, else int16. NaN gives 0.
        step: (tokens, 1) float32, ``scale * 2**-max_shift``; NaN in rows that hold one, which so reaches all their outputs.
    Raises:
        UnsupportedError: two int8 limbs do not hold the levels.
    """
    fmt = FloatFormat(exponent_bits, mantissa_bits, signed)
    check_limbs(fmt, max_shift)
    x = (hadamard(x) if transform else x.float()).contiguous()
    step = token_scale(x, scale, shift, smooth, fmt.max_level) if per_token else scale.reshape(1, 1)
    level = round_to_level(x * input_multiplier(step, shift, smooth), fmt)
    numbers = ~level.isnan().any(-1, keepdim=True)
    level.nan_to_num_(nan=0.0)
    if shift is not None:
        level.mul_(torch.exp2(max_shift - shift.float()))
    dtype = torch.int8 if fmt.max_level << max_shift <= LIMB else torch.int16
    return level.to(dtype), torch.where(numbers, step * 2.0**-max_shift, torch.nan)


quantize_input = torch.library.custom_op("llm_fp4::quantize_input", quantize_input_reference, mutates_args=())


quantize_input.register_fake(lambda x, scale, shift, smooth, *rule: empty_levels(x, *rule))


def accumulate(levels: Tensor, weight_levels: Tensor) -> Tensor:
    """Return the exact (tokens, out) sums of products: int32 for int8 ``levels``, int64 for int16 (two limbs)."""
    if levels.dtype == torch.int8:
        return int8_product(levels, weight_levels)
    high, low = (levels >> 7).to(torch.int8), (levels & 127).to(torch.int8)
    return int8_product(high, weight_levels).long() * 128 + int8_product(low, weight_levels)


def int_linear_reference(
    levels: Tensor, step: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None,
    exponent_bits: int, mantissa_bits: int,
) -> Tensor:  # fmt: skip
    """Return the (tokens, out) float32 of an exact integer product: ``float32(acc) * (step * weight_scale) + bias``.

    Args:
        levels, step: from :func:`quantize_input`; (tokens, in), (1 or tokens, 1).
        weight_packed: (out, packed_width(in, bits)) uint8 of signed codes whose largest level is at most 127.
        weight_scale: (out,) float32. bias: (out,) float32 or None.
    """
    fmt = FloatFormat(exponent_bits, mantissa_bits)
    weight = decode(unpack(weight_packed, fmt.bits, levels.shape[1]), fmt).to(torch.int8)
    out = accumulate(levels, weight).float().mul_(step * weight_scale)
    return out if bias is None else out.add_(bias)


int_linear = torch.library.custom_op("llm_fp4::int_linear", int_linear_reference, mutates_args=())


int_linear.register_fake(lambda levels, step, weight_packed, *_: empty_product(levels, weight_packed))


def float_linear_reference(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, exponent_bits: int, mantissa_bits: int
) -> Tensor:
    """Return the (tokens, out) float32 of a float input and packed weights, decoded for this call only.

    Args:
        x: (tokens, in) float32. Others as in :func:`int_linear`, any signed format.
    """
    fmt = FloatFormat(exponent_bits, mantissa_bits)
    weight = decode(unpack(weight_packed, fmt.bits, x.shape[1]), fmt)
    out = (x.float() @ weight.t()).mul_(weight_scale)
    return out if bias is None else out.add_(bias)


float_linear = torch.library.custom_op("llm_fp4::float_linear", float_linear_reference, mutates_args=())


float_linear.register_fake(empty_product)


def integer_product(input_top: int, weight_format: FloatFormat) -> bool:
    """Return whether int8 limbs and int32 sums hold the product exactly, for up to 131,072 input channels."""
    return input_top <= TWO_LIMBS and weight_format.max_level <= LIMB
