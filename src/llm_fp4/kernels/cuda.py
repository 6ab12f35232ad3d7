"""CUDA overrides of the operations by the Triton kernels, imported at the first use; without triton the reference bodies run."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from llm_fp4.kernels import ops
from llm_fp4.numerics import FloatFormat


@cache
def _kernels() -> ModuleType | None:
    """Return the Triton kernels, or None, said once, where triton is missing or LLM_FP4_KERNEL is "torch"."""
    if os.environ.get("LLM_FP4_KERNEL") == "torch":
        return None
    if importlib.util.find_spec("triton") is None:
        logging.getLogger(__name__).warning("running without GPU kernels, through torch and slower; pip install triton")
        return None
    from llm_fp4.kernels import triton

    return triton


def _dense(*tensors: Tensor | None) -> bool:
    return all(t is None or (t.is_contiguous() and t.is_cuda) for t in tensors)


@ops.quantize_input.register_kernel("cuda")
def quantize_input(
    x: Tensor, scale: Tensor, shift: Tensor | None, smooth: Tensor | None,
    exponent_bits: int, mantissa_bits: int, signed: bool, max_shift: int, per_token: bool, transform: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return what :func:`llm_fp4.kernels.ops.quantize_input` does, bit for bit."""
    kernels = _kernels()
    fmt = FloatFormat(exponent_bits, mantissa_bits, signed)
    ops.check_limbs(fmt, max_shift)
    if kernels is None or not _dense(scale, shift, smooth):
        return ops.quantize_input_reference(
            x, scale, shift, smooth, exponent_bits, mantissa_bits, signed, max_shift, per_token, transform
        )
    x = x if x.dtype in (torch.float32, torch.bfloat16) else x.float()
    out: tuple[Tensor, Tensor] = kernels.quantize_input(x, scale, shift, smooth, fmt, max_shift, per_token, transform)
    return out


@ops.int_linear.register_kernel("cuda")
def int_linear(
    levels: Tensor, step: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None,
    exponent_bits: int, mantissa_bits: int,
) -> Tensor:  # fmt: skip
    """Return what :func:`llm_fp4.kernels.ops.int_linear` does, bit for bit; 4-bit formats and E1M6 are covered."""
    kernels = _kernels()
    bits = 1 + exponent_bits + mantissa_bits
    covered = (bits == 4 or (bits == 8 and exponent_bits == 1)) and _dense(step, weight_packed, weight_scale, bias)
    if kernels is None or not covered:
        return ops.int_linear_reference(levels, step, weight_packed, weight_scale, bias, exponent_bits, mantissa_bits)
    fmt = FloatFormat(exponent_bits, mantissa_bits)
    out: Tensor = kernels.int_linear(levels, step, weight_packed, weight_scale, bias, fmt)
    return out


@ops.float_linear.register_kernel("cuda")
def float_linear(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, exponent_bits: int, mantissa_bits: int
) -> Tensor:
    """Return what :func:`llm_fp4.kernels.ops.float_linear` does, but for the order of its float32 sums; 4-bit formats."""
    kernels = _kernels()
    if kernels is None or 1 + exponent_bits + mantissa_bits != 4 or not _dense(weight_packed, weight_scale, bias):
        return ops.float_linear_reference(x, weight_packed, weight_scale, bias, exponent_bits, mantissa_bits)
    out: Tensor = kernels.float_linear(x, weight_packed, weight_scale, bias, FloatFormat(exponent_bits, mantissa_bits))
    return out
