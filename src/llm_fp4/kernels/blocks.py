"""The operations of block formats (NVFP4, MXFP4) as torch.library ops: inputs scaled block by block, decoded weights.

Values are exact products of a level and a stored scale; only the sum over channels rounds. The bodies are the reference;
``cpu_blocks`` overrides the products.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from llm_fp4.kernels.hadamard import hadamard
from llm_fp4.kernels.ops import empty_product
from llm_fp4.numerics import FloatFormat, PerBlock, block_step, decode, max_scale, round_to_level, unpack


@torch.library.custom_op("llm_fp4::quantize_blocks", mutates_args=())
def quantize_blocks(x: Tensor, second: Tensor, block_size: int, scale_dtype: str, exponent_bits: int, mantissa_bits: int) -> Tensor:
    """Return (tokens, in) float32 ``x`` rounded under the scale that each block's largest magnitude asks for, at run time.

    Args:
        x: (tokens, in) float. second: () float32, the static scale over E4M3 scales; 1 for other scales.
        block_size, scale_dtype: see :class:`~llm_fp4.numerics.PerBlock`; the last block of a row may be short.
    Returns:
        (tokens, in) float32 values; a block whose stored scale is 0 becomes 0.
    """
    fmt, blocks = FloatFormat(exponent_bits, mantissa_bits), PerBlock(block_size, scale_dtype)
    columns = x.shape[-1]
    padded = pad(x.float(), (0, -columns % block_size))
    tiles = padded.reshape(len(x), padded.shape[-1] // block_size, block_size)  # (tokens, blocks, block_size)
    step = block_step(max_scale(tiles.abs().amax(-1), second, fmt, blocks), second, fmt).unsqueeze(-1)
    inverse = torch.where(step > 0, 1.0 / step, torch.zeros_like(step))
    return round_to_level(tiles * inverse, fmt).mul_(step).flatten(-2)[:, :columns].contiguous()


quantize_blocks.register_fake(lambda x, *_: x.new_empty(x.shape, dtype=torch.float32))


def block_linear_reference(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, second: Tensor | None, bias: Tensor | None,
    block_size: int, scale_dtype: str, exponent_bits: int, mantissa_bits: int,
) -> Tensor:  # fmt: skip
    """Return the (tokens, out) float32 of a float input and weights with block scales, decoded for this call only.

    Args:
        x: (tokens, in) float. weight_packed: (out, packed_width(in, bits)) uint8.
        weight_scale: (out, ceil(in / block_size)) uint8, the stored bytes of E4M3 or E8M0, or float16.
        second: () float32 over E4M3 scales, None for others. bias: (out,) float32 or None.
    """
    fmt = FloatFormat(exponent_bits, mantissa_bits)
    columns = x.shape[-1]
    stored = weight_scale.view(PerBlock(block_size, scale_dtype).torch_dtype)
    step = block_step(stored, second, fmt).repeat_interleave(block_size, -1)[:, :columns]
    weight = decode(unpack(weight_packed, fmt.bits, columns), fmt).mul_(step)
    out = x.float() @ weight.t()
    return out if bias is None else out.add_(bias)


block_linear = torch.library.custom_op("llm_fp4::block_linear", block_linear_reference, mutates_args=())


block_linear.register_fake(empty_product)


def quantized_block_linear_reference(
    x: Tensor, input_second: Tensor, input_block_size: int, input_scale_dtype: str, input_exponent_bits: int, input_mantissa_bits: int,
    weight_packed: Tensor, weight_scale: Tensor, second: Tensor | None, bias: Tensor | None,
    block_size: int, scale_dtype: str, exponent_bits: int, mantissa_bits: int, transform: bool = False,
) -> Tensor:  # fmt: skip
    """Return the (tokens, out) float32 of :func:`block_linear` on what :func:`quantize_blocks` makes of ``x``.

    Args:
        x to input_mantissa_bits: of :func:`quantize_blocks`. transform: whether rows pass
            :func:`llm_fp4.kernels.hadamard.hadamard` first. The others are of :func:`block_linear`.
    """
    x = hadamard(x) if transform else x
    values = quantize_blocks(x, input_second, input_block_size, input_scale_dtype, input_exponent_bits, input_mantissa_bits)
    out: Tensor = block_linear(
        values, weight_packed, weight_scale, second, bias, block_size, scale_dtype, exponent_bits, mantissa_bits
    )
    return out


quantized_block_linear = torch.library.custom_op(
    "llm_fp4::quantized_block_linear", quantized_block_linear_reference, mutates_args=()
)


quantized_block_linear.register_fake(
    lambda x, second, size, kind, exponent_bits, mantissa_bits, weight_packed, *_: empty_product(x, weight_packed)
)
