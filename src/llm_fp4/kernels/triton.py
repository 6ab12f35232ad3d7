"""GPU kernels in Triton: rounding of inputs in one pass, and products of 4-bit codes expanded in registers on int8 tensor cores.

Equal to the reference bodies bit for bit: integers are exact, and every float operation rounds once, as there. With
TRITON_INTERPRET=1 they run on CPU tensors, which is how they are tested without a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm_fp4.kernels.hadamard import hadamard, power_of_two
from llm_fp4.numerics import FloatFormat
from llm_fp4.plan import LIMB

_FEW_ROWS = 16  # up to so many, a product is bound by reading codes
_LONGEST_RUN = 8192  # channels that a transform mixes in one program; wider ones take an operation of its own


@triton.jit
def _power_of_two(n):
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _read(x_row, columns, mask, root, RUN: tl.constexpr, BLOCK: tl.constexpr):
    """Return (BLOCK,) channels, every ``2**RUN`` of them under a Hadamard transform, summed in the reference's order."""
    x = tl.load(x_row + columns, mask, other=0.0).to(tl.float32)
    if RUN:
        for step in tl.static_range(RUN):
            pairs = tl.reshape(x, (BLOCK >> (step + 1), 2, 1 << step))
            left, right = tl.split(tl.permute(pairs, (0, 2, 1)))
            x = tl.reshape(tl.permute(tl.join(left + right, left - right), (0, 2, 1)), (BLOCK,))
        x = x * root
    return x


@triton.jit
def _multiplied(x, shift, smooth, columns, mask, inverse, HAS_SHIFT: tl.constexpr, HAS_SMOOTH: tl.constexpr):
    """Return x times what brings it to the grid, in the reference's order of roundings, and the shifts."""
    k = columns * 0
    multiplier = inverse + tl.zeros(columns.shape, tl.float32)
    if HAS_SMOOTH:
        multiplier = multiplier * tl.div_rn(1.0, tl.load(smooth + columns, mask, other=1.0))
    if HAS_SHIFT:
        k = tl.load(shift + columns, mask, other=0).to(tl.int32)
        multiplier = multiplier * _power_of_two(k)
    return tl.where(mask, x * multiplier, 0.0), k


@triton.jit
def _quantize_kernel(
    x, scale, shift, smooth, levels, step_out, width, low, top, unit, root,
    M: tl.constexpr, MAX_SHIFT: tl.constexpr, PER_TOKEN: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_SMOOTH: tl.constexpr,
    RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    step = tl.load(scale)
    if PER_TOKEN:
        largest = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, width, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            value = _read(x + row * width, columns, columns < width, root, RUN, BLOCK)
            value, _ = _multiplied(value, shift, smooth, columns, columns < width, 1.0, HAS_SHIFT, HAS_SMOOTH)
            value = tl.abs(value)
            largest = tl.where((value > largest) | (value != value), value, largest)  # a NaN stays
        bits = largest.to(tl.int32, bitcast=True)  # of non-negative floats in order, NaN above all
        highest = tl.max(bits, 0).to(tl.float32, bitcast=True)
        found = highest * tl.div_rn(step, top)
        step = tl.where(highest == 0.0, 1.0, tl.where(found < 1.1754943508222875e-38, 1.1754943508222875e-38, found))
    inverse = tl.div_rn(1.0, step)
    problems = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mask = columns < width
        value = _read(x + row * width, columns, mask, root, RUN, BLOCK)
        value, k = _multiplied(value, shift, smooth, columns, mask, inverse, HAS_SHIFT, HAS_SMOOTH)
        number = value == value
        problems = problems | tl.where(number, 0, 1)
        value = tl.where(value < low, low, value)
        value = tl.where(value > top, top, value)
        power = value.to(tl.int32, bitcast=True) & 0x7F800000  # 2^floor(log2|value|)
        exponent = tl.maximum(power, (M + 127) << 23) - (M << 23)
        spacing = exponent.to(tl.float32, bitcast=True)
        inverse_spacing = ((254 << 23) - exponent).to(tl.float32, bitcast=True)
        level = ((value * inverse_spacing + 12582912.0) - 12582912.0) * spacing  # half to even: both factors are powers of two
        level = tl.where(number, level, 0.0)
        if HAS_SHIFT:
            level = level * _power_of_two(MAX_SHIFT - k)
        tl.store(levels + row * width + columns, level.to(levels.dtype.element_ty), mask)
    bad = tl.max(problems, 0)
    tl.store(step_out + row, tl.where(bad == 0, step * unit, float("nan")))


@triton.jit
def _level(code, E: tl.constexpr, M: tl.constexpr):
    """Return the int32 level of a code with its sign on top."""
    magnitude = code & ((1 << (E + M)) - 1)
    field, fraction = magnitude >> M, magnitude & ((1 << M) - 1)
    shifted = ((1 << M) + fraction) << tl.maximum(field - 1, 0)
    level = tl.where(field == 0, fraction, shifted)
    return tl.where((code >> (E + M)) & 1 == 1, -level, level)


@triton.jit
def _limb_products(x_row, columns, rows_mask, width, weight, high, low, WIDE: tl.constexpr):
    """Return the sums ``high`` and ``low`` with the products of some columns' limbs added."""
    x = tl.load(x_row[:, None] + columns[None, :], rows_mask[:, None] & (columns < width)[None, :], other=0)
    if WIDE:
        high = tl.dot((x >> 7).to(tl.int8), weight, high, out_dtype=tl.int32)
        low = tl.dot((x & 127).to(tl.int8), weight, low, out_dtype=tl.int32)
    else:
        low = tl.dot(x, weight, low, out_dtype=tl.int32)
    return high, low


@triton.jit
def _int_linear_kernel(
    levels, step, codes, scale, bias, y, tokens, width, out, row_bytes, step_stride,
    E: tl.constexpr, M: tl.constexpr, WIDE: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, OUTS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    outs = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    rows_mask, outs_mask = rows < tokens, outs < out
    x_row = levels + rows.to(tl.int64) * width
    code_row = codes + outs.to(tl.int64) * row_bytes
    high = tl.zeros((ROWS, OUTS), tl.int32)
    low = tl.zeros((ROWS, OUTS), tl.int32)
    for first in range(0, row_bytes, BYTES):
        at = first + tl.arange(0, BYTES)
        packed = tl.load(code_row[None, :] + at[:, None], (at < row_bytes)[:, None] & outs_mask[None, :], other=0).to(tl.int32)
        if E + M == 3:  # two codes a byte, the even column in the low nibble
            even, odd = _level(packed & 15, E, M).to(tl.int8), _level(packed >> 4, E, M).to(tl.int8)
            high, low = _limb_products(x_row, 2 * at, rows_mask, width, even, high, low, WIDE)
            high, low = _limb_products(x_row, 2 * at + 1, rows_mask, width, odd, high, low, WIDE)
        else:
            high, low = _limb_products(x_row, at, rows_mask, width, _level(packed, E, M).to(tl.int8), high, low, WIDE)
    total = (high.to(tl.int64) * 128 + low).to(tl.float32) if WIDE else low.to(tl.float32)
    steps = tl.load(step + rows * step_stride, rows_mask, other=0.0)
    scales = tl.load(scale + outs, outs_mask, other=0.0)
    result = total * (steps[:, None] * scales[None, :])
    if HAS_BIAS:
        result = result + tl.load(bias + outs, outs_mask, other=0.0)[None, :]
    tl.store(y + rows.to(tl.int64)[:, None] * out + outs[None, :], result, rows_mask[:, None] & outs_mask[None, :])


@triton.jit
def _float_linear_kernel(
    x, codes, scale, bias, y, tokens, width, out, row_bytes, E: tl.constexpr, M: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, OUTS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    outs = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    rows_mask, outs_mask = rows < tokens, outs < out
    x_row = x + rows.to(tl.int64)[:, None] * width
    code_row = codes + outs.to(tl.int64) * row_bytes
    total = tl.zeros((ROWS, OUTS), tl.float32)
    for first in range(0, row_bytes, BYTES):
        at = first + tl.arange(0, BYTES)
        packed = tl.load(code_row[None, :] + at[:, None], (at < row_bytes)[:, None] & outs_mask[None, :], other=0).to(tl.int32)
        for side in tl.static_range(2):
            columns = 2 * at + side
            level = _level((packed >> (4 * side)) & 15, E, M).to(tl.float32)
            part = tl.load(x_row + columns[None, :], rows_mask[:, None] & (columns < width)[None, :], other=0.0)
            total = tl.dot(part, level, total, input_precision="ieee")
    result = total * tl.load(scale + outs, outs_mask, other=0.0)[None, :]
    if HAS_BIAS:
        result = result + tl.load(bias + outs, outs_mask, other=0.0)[None, :]
    tl.store(y + rows.to(tl.int64)[:, None] * out + outs[None, :], result, rows_mask[:, None] & outs_mask[None, :])


def quantize_input(
    x: Tensor, scale: Tensor, shift: Tensor | None, smooth: Tensor | None, fmt: FloatFormat, max_shift: int, per_token: bool,
    transform: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return what :func:`llm_fp4.kernels.ops.quantize_input` does, for (tokens, in) float32 or bfloat16 ``x``."""
    tokens, width = x.shape
    size = power_of_two(width) if transform and width else 1
    if size > _LONGEST_RUN:
        x, size = hadamard(x), 1
    x = x.contiguous()
    block = max(size, min(1024, triton.next_power_of_2(max(width, 16))))
    levels = torch.empty_like(x, dtype=torch.int8 if fmt.max_level << max_shift <= LIMB else torch.int16)
    step = x.new_empty((tokens, 1), dtype=torch.float32)
    if tokens:
        top = float(fmt.max_level)
        _quantize_kernel[(tokens,)](
            x, scale, shift, smooth, levels, step, width, -top if fmt.signed else 0.0, top, 2.0**-max_shift, size**-0.5,
            M=fmt.mantissa_bits, MAX_SHIFT=max_shift, PER_TOKEN=per_token, HAS_SHIFT=shift is not None,
            HAS_SMOOTH=smooth is not None, RUN=size.bit_length() - 1, BLOCK=block, num_warps=4 if block <= 1024 else 8,
            enable_fp_fusion=False,
        )  # fmt: skip
    return levels, step


def int_linear(levels: Tensor, step: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, fmt: FloatFormat) -> Tensor:
    """Return what :func:`llm_fp4.kernels.ops.int_linear` does, for 4-bit formats and 8-bit ones whose levels fit int8."""
    levels = levels.contiguous()
    (tokens, width), out = levels.shape, len(codes)
    y = levels.new_empty((tokens, out), dtype=torch.float32)
    if y.numel():
        grid, sizes = _tiles(tokens, out)
        _int_linear_kernel[grid](
            levels, step, codes, scale, bias, y, tokens, width, out, codes.shape[1], int(step.numel() != 1), E=fmt.exponent_bits,
            M=fmt.mantissa_bits, WIDE=levels.dtype == torch.int16, HAS_BIAS=bias is not None, enable_fp_fusion=False, **sizes,
        )  # fmt: skip
    return y


def float_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, fmt: FloatFormat) -> Tensor:
    """Return what :func:`llm_fp4.kernels.ops.float_linear` does, but for the order of its float32 sums, for 4-bit formats."""
    x = x.float().contiguous()
    (tokens, width), out = x.shape, len(codes)
    y = x.new_empty((tokens, out))
    if y.numel():
        grid, sizes = _tiles(tokens, out)
        _float_linear_kernel[grid](
            x, codes, scale, bias, y, tokens, width, out, codes.shape[1], E=fmt.exponent_bits, M=fmt.mantissa_bits,
            HAS_BIAS=bias is not None, enable_fp_fusion=False, **{**sizes, "BYTES": 32},
        )  # fmt: skip
    return y


def _tiles(tokens: int, out: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """Return the grid and the tile of a product: narrow outputs where reading codes is what takes time, else square."""
    if tokens <= _FEW_ROWS:
        sizes = {"ROWS": 16, "OUTS": 16, "BYTES": 128, "num_warps": 4}
    else:
        sizes = {"ROWS": 64 if tokens <= 64 else 128, "OUTS": 128, "BYTES": 32, "num_warps": 8}
    return (triton.cdiv(out, sizes["OUTS"]), triton.cdiv(tokens, sizes["ROWS"])), sizes
