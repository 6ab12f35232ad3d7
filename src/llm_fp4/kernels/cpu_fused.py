"""CPU overrides of the fused operations and of the Hadamard transform; what the compiled kernels do not cover runs the reference bodies."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_fp4.kernels.compiled import selected
from llm_fp4.kernels.cpu import address, check, max_level, readable, ready, threads
from llm_fp4.kernels.fused import quantized_linear as quantized_linear_op
from llm_fp4.kernels.fused import quantized_linear_reference
from llm_fp4.kernels.hadamard import hadamard as hadamard_op
from llm_fp4.kernels.hadamard import hadamard_reference
from llm_fp4.kernels.norm import norm_quantize_input as norm_quantize_input_op
from llm_fp4.kernels.norm import norm_quantize_input_reference
from llm_fp4.numerics.packing import packed_width
from llm_fp4.plan import LIMB, TWO_LIMBS


@quantized_linear_op.register_kernel("cpu")
def quantized_linear(
    x: Tensor, scale: Tensor, shift: Tensor | None, smooth: Tensor | None,
    exponent_bits: int, mantissa_bits: int, signed: bool, max_shift: int, per_token: bool,
    weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, weight_exponent_bits: int, weight_mantissa_bits: int,
    transform: bool = False,
) -> Tensor:  # fmt: skip
    """Return what :func:`llm_fp4.kernels.fused.quantized_linear` does, bit for bit."""
    library = selected()
    (tokens, width), out, bits = x.shape, len(weight_packed), 1 + weight_exponent_bits + weight_mantissa_bits
    covered = (
        max_level(exponent_bits, mantissa_bits, signed) << max_shift <= TWO_LIMBS
        and (bits == 4 or (bits == 8 and weight_exponent_bits == 1))
        and ready(scale, torch.float32, 1) and ready(shift, torch.uint8, width) and ready(smooth, torch.float32, width)
        and ready(weight_packed, torch.uint8, out * packed_width(width, bits))
        and ready(weight_scale, torch.float32, out) and ready(bias, torch.float32, out)
    )  # fmt: skip
    if library is None or not covered:
        return quantized_linear_reference(
            x, scale, shift, smooth, exponent_bits, mantissa_bits, signed, max_shift, per_token, weight_packed, weight_scale, bias,
            weight_exponent_bits, weight_mantissa_bits, transform,
        )  # fmt: skip
    x = readable(x)
    y = torch.empty((tokens, out), dtype=torch.float32)
    check(
        library.llm_fp4_quantized_linear(
            x.data_ptr(), x.dtype == torch.bfloat16, tokens, width, scale.data_ptr(), address(shift), address(smooth),
            exponent_bits, mantissa_bits, signed, max_shift, per_token, weight_packed.data_ptr(), out, weight_scale.data_ptr(),
            address(bias), weight_exponent_bits, weight_mantissa_bits, transform, y.data_ptr(), threads(tokens * weight_packed.numel()),
        )
    )  # fmt: skip
    return y


@norm_quantize_input_op.register_kernel("cpu")
def norm_quantize_input(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centered: bool, scale: Tensor, shift: Tensor | None, smooth: Tensor | None,
    exponent_bits: int, mantissa_bits: int, signed: bool, max_shift: int, per_token: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return what :func:`llm_fp4.kernels.norm.norm_quantize_input` does, bit for bit."""
    library = selected()
    top = max_level(exponent_bits, mantissa_bits, signed) << max_shift
    tokens, width = x.shape
    covered = (
        top <= TWO_LIMBS and ready(scale, torch.float32, 1) and ready(shift, torch.uint8, width) and width > 0
        and all(ready(t, torch.float32, width) for t in (smooth, weight, bias))
    )  # fmt: skip
    if library is None or not covered:
        return norm_quantize_input_reference(
            x, weight, bias, eps, centered, scale, shift, smooth, exponent_bits, mantissa_bits, signed, max_shift, per_token
        )
    x = readable(x)
    levels = torch.empty((tokens, width), dtype=torch.int8 if top <= LIMB else torch.int16)
    step = torch.empty((tokens, 1), dtype=torch.float32)
    check(
        library.llm_fp4_norm_quantize_input(
            x.data_ptr(), x.dtype == torch.bfloat16, tokens, width, weight.data_ptr(), address(bias), eps, centered,
            scale.data_ptr(), address(shift), address(smooth), exponent_bits, mantissa_bits, signed, max_shift, per_token,
            levels.data_ptr(), step.data_ptr(), threads(x.numel()),
        )
    )  # fmt: skip
    return levels, step


@hadamard_op.register_kernel("cpu")
def hadamard(x: Tensor) -> Tensor:
    """Return what :func:`llm_fp4.kernels.hadamard.hadamard` does, bit for bit."""
    library = selected()
    if library is None or x.numel() == 0:
        return hadamard_reference(x)
    x = x.float().contiguous()
    y = torch.empty_like(x)
    width = x.shape[-1]
    check(library.llm_fp4_hadamard(x.data_ptr(), x.numel() // width, width, y.data_ptr(), threads(x.numel())))
    return y
