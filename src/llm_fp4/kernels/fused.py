"""A quantized linear layer as one operation: at one row, what surrounds a product costs more than the product."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_fp4.kernels.ops import empty_product, int_linear, quantize_input


def quantized_linear_reference(
    x: Tensor, scale: Tensor, shift: Tensor | None, smooth: Tensor | None,
    exponent_bits: int, mantissa_bits: int, signed: bool, max_shift: int, per_token: bool,
    weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, weight_exponent_bits: int, weight_mantissa_bits: int,
    transform: bool = False,
) -> Tensor:  # fmt: skip
    """Return the (tokens, out) float32 of :func:`llm_fp4.kernels.ops.int_linear` on the levels of ``x``.

    Args:
        x to per_token, transform: of :func:`llm_fp4.kernels.ops.quantize_input`. The others are of the product.
    """
    levels, step = quantize_input(x, scale, shift, smooth, exponent_bits, mantissa_bits, signed, max_shift, per_token, transform)
    out: Tensor = int_linear(levels, step, weight_packed, weight_scale, bias, weight_exponent_bits, weight_mantissa_bits)
    return out


quantized_linear = torch.library.custom_op("llm_fp4::quantized_linear", quantized_linear_reference, mutates_args=())


quantized_linear.register_fake(
    lambda x, scale, shift, smooth, exponent_bits, mantissa_bits, signed, max_shift, per_token, weight_packed, *_: empty_product(
        x, weight_packed
    )
)
