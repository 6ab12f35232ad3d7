"""CPU overrides of the operations by the compiled kernels; what those do not cover runs the reference bodies."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from llm_fp4.kernels import ops
from llm_fp4.kernels.compiled import selected
from llm_fp4.numerics import FloatFormat
from llm_fp4.numerics.packing import packed_width
from llm_fp4.plan import LIMB, TWO_LIMBS

_FEW_BYTES = 1 << 15  # of codes times rows: less is done sooner by one thread than shared


@cache
def max_level(exponent_bits: int, mantissa_bits: int, signed: bool) -> int:
    """Return the largest level of a format, in steps."""
    return FloatFormat(exponent_bits, mantissa_bits, signed).max_level


def address(tensor: Tensor | None) -> int | None:
    """Return where the elements of ``tensor`` lie, None (a null pointer) where there is none."""
    return None if tensor is None else tensor.data_ptr()


def readable(x: Tensor) -> Tensor:
    """Return ``x`` as the kernels read it: float32 or bfloat16, contiguous."""
    return (x if x.dtype in (torch.float32, torch.bfloat16) else x.float()).contiguous()


def ready(tensor: Tensor | None, dtype: torch.dtype, count: int) -> bool:
    """Return whether ``tensor`` is absent or can be read in place: that type, that many elements, dense."""
    return tensor is None or (tensor.dtype == dtype and tensor.numel() == count and tensor.is_contiguous() and tensor.is_cpu)


def check(status: int) -> None:
    """Raise MemoryError where a kernel's status says that it found no memory."""
    if status != 0:
        raise MemoryError("the CPU kernels found no working memory; pass fewer tokens at a time")


def threads(work: int) -> int:
    """Return how many threads share ``work``, in bytes of codes times rows."""
    return 1 if work <= _FEW_BYTES else torch.get_num_threads()


@ops.quantize_input.register_kernel("cpu")
def quantize_input(
    x: Tensor, scale: Tensor, shift: Tensor | None, smooth: Tensor | None,
    exponent_bits: int, mantissa_bits: int, signed: bool, max_shift: int, per_token: bool, transform: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return what :func:`llm_fp4.kernels.ops.quantize_input` does, bit for bit."""
    library = selected()
    top = max_level(exponent_bits, mantissa_bits, signed) << max_shift
    covered = (
        top <= TWO_LIMBS and ready(scale, torch.float32, 1)
        and ready(shift, torch.uint8, x.shape[1]) and ready(smooth, torch.float32, x.shape[1])
    )  # fmt: skip
    if library is None or not covered:
        rule = (exponent_bits, mantissa_bits, signed, max_shift, per_token, transform)
        return ops.quantize_input_reference(x, scale, shift, smooth, *rule)
    tokens, width = x.shape
    x = readable(x)
    levels = torch.empty((tokens, width), dtype=torch.int8 if top <= LIMB else torch.int16)
    step = torch.empty((tokens, 1), dtype=torch.float32)
    check(
        library.llm_fp4_quantize_input(
            x.data_ptr(), x.dtype == torch.bfloat16, tokens, width, scale.data_ptr(), address(shift), address(smooth),
            exponent_bits, mantissa_bits, signed, max_shift, per_token, transform, levels.data_ptr(), step.data_ptr(),
            threads(x.numel()),
        )
    )  # fmt: skip
    return levels, step


@ops.int_linear.register_kernel("cpu")
def int_linear(
    levels: Tensor, step: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None,
    exponent_bits: int, mantissa_bits: int,
) -> Tensor:  # fmt: skip
    """Return what :func:`llm_fp4.kernels.ops.int_linear` does, bit for bit; 4-bit formats and E1M6 are covered."""
    library = selected()
    bits = 1 + exponent_bits + mantissa_bits
    tokens, width = levels.shape
    out = len(weight_packed)
    covered = (
        (bits == 4 or (bits == 8 and exponent_bits == 1))
        and step.numel() in (1, tokens) and ready(step, torch.float32, step.numel())
        and ready(weight_packed, torch.uint8, out * packed_width(width, bits))
        and ready(weight_scale, torch.float32, out) and ready(bias, torch.float32, out)
    )  # fmt: skip
    if library is None or not covered:
        return ops.int_linear_reference(levels, step, weight_packed, weight_scale, bias, exponent_bits, mantissa_bits)
    levels = levels.contiguous()
    y = torch.empty((tokens, out), dtype=torch.float32)
    check(
        library.llm_fp4_int_linear(
            levels.data_ptr(), levels.dtype == torch.int16, tokens, width, step.data_ptr(), int(step.numel() != 1),
            weight_packed.data_ptr(), out, weight_scale.data_ptr(), address(bias), exponent_bits, mantissa_bits,
            y.data_ptr(), threads(tokens * weight_packed.numel()),
        )
    )  # fmt: skip
    return y


@ops.float_linear.register_kernel("cpu")
def float_linear(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, exponent_bits: int, mantissa_bits: int
) -> Tensor:
    """Return what :func:`llm_fp4.kernels.ops.float_linear` does, but for the order of its float32 sums; 4-bit formats."""
    library = selected()
    bits = 1 + exponent_bits + mantissa_bits
    tokens, width = x.shape
    out = len(weight_packed)
    covered = (
        bits == 4 and ready(weight_packed, torch.uint8, out * packed_width(width, bits))
        and ready(weight_scale, torch.float32, out) and ready(bias, torch.float32, out)
    )  # fmt: skip
    if library is None or not covered:
        return ops.float_linear_reference(x, weight_packed, weight_scale, bias, exponent_bits, mantissa_bits)
    x = readable(x)
    y = torch.empty((tokens, out), dtype=torch.float32)
    check(
        library.llm_fp4_float_linear(
            x.data_ptr(), x.dtype == torch.bfloat16, tokens, width, weight_packed.data_ptr(), out, weight_scale.data_ptr(), address(bias),
            exponent_bits, mantissa_bits, y.data_ptr(), threads(tokens * weight_packed.numel()),
        )
    )  # fmt: skip
    return y
