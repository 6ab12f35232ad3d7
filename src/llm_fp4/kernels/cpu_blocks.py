"""CPU overrides of the products of block formats by the compiled kernels; what those do not cover runs the reference bodies."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_fp4.kernels import blocks
from llm_fp4.kernels.compiled import selected
from llm_fp4.kernels.cpu import address, check, max_level, readable, ready, threads
from llm_fp4.numerics.packing import packed_width
from llm_fp4.plan import LIMB

_SIZES = (8, 16, 32, 64, 128)  # whole sums of a run of columns
SCALE_TYPES = ("e4m3", "e8m0", "float16")  # by their numbers in csrc/kernels.h


def covered_blocks(size: int, kind: str, alone: bool = False) -> bool:
    """Return whether the kernels read scales of such blocks, of weights ``alone`` or of weights and inputs."""
    return size in _SIZES and kind in (SCALE_TYPES if alone else SCALE_TYPES[:2])


def _covered(
    width: int, packed: Tensor, scale: Tensor, second: Tensor | None, bias: Tensor | None, size: int, kind: str, bits: int,
    alone: bool,
) -> bool:  # fmt: skip
    """Return whether the kernels read such a weight: 4-bit codes, scales of blocks that are whole sums."""
    out = len(packed)
    stored = torch.float16 if kind == "float16" else torch.uint8
    return (
        bits == 4 and covered_blocks(size, kind, alone) and ready(packed, torch.uint8, out * packed_width(width, bits))
        and ready(scale, stored, out * -(-width // size))
        and ready(second, torch.float32, 1) and ready(bias, torch.float32, out)
    )  # fmt: skip


@blocks.block_linear.register_kernel("cpu")
def block_linear(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, second: Tensor | None, bias: Tensor | None,
    block_size: int, scale_dtype: str, exponent_bits: int, mantissa_bits: int,
) -> Tensor:  # fmt: skip
    """Return what :func:`llm_fp4.kernels.blocks.block_linear` does, but for the order of its float32 sums."""
    library = selected()
    bits = 1 + exponent_bits + mantissa_bits
    tokens, width = x.shape
    covered = _covered(width, weight_packed, weight_scale, second, bias, block_size, scale_dtype, bits, alone=True)
    if library is None or not covered:
        return blocks.block_linear_reference(
            x, weight_packed, weight_scale, second, bias, block_size, scale_dtype, exponent_bits, mantissa_bits
        )
    x = readable(x)
    y = torch.empty((tokens, len(weight_packed)), dtype=torch.float32)
    check(
        library.llm_fp4_block_float_linear(
            x.data_ptr(), x.dtype == torch.bfloat16, tokens, width, weight_packed.data_ptr(), len(weight_packed), weight_scale.data_ptr(), block_size,
            SCALE_TYPES.index(scale_dtype), address(second), address(bias), exponent_bits, mantissa_bits, y.data_ptr(),
            threads(tokens * weight_packed.numel()),
        )
    )  # fmt: skip
    return y


@blocks.quantized_block_linear.register_kernel("cpu")
def quantized_block_linear(
    x: Tensor, input_second: Tensor, input_block_size: int, input_scale_dtype: str, input_exponent_bits: int, input_mantissa_bits: int,
    weight_packed: Tensor, weight_scale: Tensor, second: Tensor | None, bias: Tensor | None,
    block_size: int, scale_dtype: str, exponent_bits: int, mantissa_bits: int, transform: bool = False,
) -> Tensor:  # fmt: skip
    """Return what :func:`llm_fp4.kernels.blocks.quantized_block_linear` does, but for the order of its float32 sums.

    The sum of eight columns is an exact integer, and its product with the scales of both blocks exact in float32 for pairs
    of 4-bit formats under powers of two as second scales.
    """
    library = selected()
    tokens, width = x.shape
    covered = (
        _covered(width, weight_packed, weight_scale, second, bias, block_size, scale_dtype, 1 + exponent_bits + mantissa_bits, alone=False)
        and covered_blocks(input_block_size, input_scale_dtype) and ready(input_second, torch.float32, 1)
        and max_level(input_exponent_bits, input_mantissa_bits, True) <= LIMB
    )  # fmt: skip
    if library is None or not covered:
        return blocks.quantized_block_linear_reference(
            x, input_second, input_block_size, input_scale_dtype, input_exponent_bits, input_mantissa_bits,
            weight_packed, weight_scale, second, bias, block_size, scale_dtype, exponent_bits, mantissa_bits, transform,
        )  # fmt: skip
    x = readable(x)
    y = torch.empty((tokens, len(weight_packed)), dtype=torch.float32)
    check(
        library.llm_fp4_quantized_block_linear(
            x.data_ptr(), x.dtype == torch.bfloat16, tokens, width, input_block_size, SCALE_TYPES.index(input_scale_dtype),
            input_second.data_ptr(), input_exponent_bits, input_mantissa_bits, weight_packed.data_ptr(), len(weight_packed),
            weight_scale.data_ptr(), block_size, SCALE_TYPES.index(scale_dtype), address(second), address(bias), exponent_bits,
            mantissa_bits, transform, y.data_ptr(), threads(tokens * weight_packed.numel()),
        )
    )  # fmt: skip
    return y
