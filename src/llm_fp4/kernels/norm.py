"""The norm before a quantized input, fused with its rounding: one pass over a row instead of six.

Sums run in float64 over sixteen lanes and are halved in a fixed order, so that every kernel rounds alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_fp4.kernels.ops import empty_levels, quantize_input_reference

_LANES = 16


def _sum(x: Tensor) -> Tensor:
    """Return the (rows, 1) sums of (rows, n) float64 ``x`` in the kernels' order."""
    rows, n = x.shape
    lanes = x.new_zeros((rows, _LANES))
    for first in range(0, n, _LANES):
        part = x[:, first : first + _LANES]
        lanes[:, : part.shape[1]] += part
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes


def normalize(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centered: bool) -> Tensor:
    """Return (tokens, in) float32: LayerNorm of ``x`` where ``centered``, else RMSNorm.

    Args:
        weight: (in,) float32. bias: (in,) float32 or None.
    """
    d = x.double()
    if centered:
        d = d - _sum(d) / x.shape[1]
    inverse = 1.0 / torch.sqrt(_sum(d * d) / x.shape[1] + eps)
    out = (d * inverse).float() * weight
    return out if bias is None else out + bias


def norm_quantize_input_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centered: bool, scale: Tensor, shift: Tensor | None, smooth: Tensor | None,
    exponent_bits: int, mantissa_bits: int, signed: bool, max_shift: int, per_token: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the levels and steps of the normalized input, as :func:`llm_fp4.kernels.ops.quantize_input` does.

    Args:
        x: (tokens, in) float32 or bfloat16. weight, bias, eps, centered: of :func:`normalize`.
    """
    normed = normalize(x, weight, bias, eps, centered)
    return quantize_input_reference(normed, scale, shift, smooth, exponent_bits, mantissa_bits, signed, max_shift, per_token)


norm_quantize_input = torch.library.custom_op("llm_fp4::norm_quantize_input", norm_quantize_input_reference, mutates_args=())


norm_quantize_input.register_fake(lambda x, weight, bias, eps, centered, scale, shift, smooth, *rule: empty_levels(x, *rule))
