"""QuantizedTensor: packed codes and their scales, a plain object."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_fp4.errors import UnsupportedError
from llm_fp4.numerics.block_scales import block_step
from llm_fp4.numerics.formats import FloatFormat
from llm_fp4.numerics.granularity import Granularity, PerBlock
from llm_fp4.numerics.packing import pack, packed_width, unpack
from llm_fp4.numerics.rounding import decode, encode_levels, require_finite, round_to_level


@dataclass(frozen=True)
class QuantizedTensor:
    """A (rows, columns) tensor stored as codes: ``value = step * level[code]``.

    Attributes:
        packed: (rows, packed_width(columns, bits)) uint8.
        scale: of the granularity's shape: float32, the step in the unit of the values; or the stored scales of blocks.
        second_scale: a float32 scale () over ``scale``, for two-level block scales (E4M3); None elsewhere.
    """

    packed: Tensor
    scale: Tensor
    format: FloatFormat
    granularity: Granularity
    shape: tuple[int, int]
    second_scale: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.second_scale is not None) != (isinstance(self.granularity, PerBlock) and self.granularity.two_level):
            raise UnsupportedError(
                f"a second_scale belongs to block scales in e4m3 and nothing else, not to {self.granularity.name}"
            )
        if tuple(self.packed.shape) != (self.shape[0], packed_width(self.shape[1], self.format.bits)):
            raise ValueError(f"packed is {tuple(self.packed.shape)}, which does not hold {self.shape} in {self.format}")

    @property
    def codes(self) -> Tensor:
        """(rows, columns) uint8."""
        return unpack(self.packed, self.format.bits, self.shape[1])

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scale.nbytes + (0 if self.second_scale is None else self.second_scale.nbytes)

    @property
    def step(self) -> Tensor:
        """float32 of the scale's shape: what a level is multiplied by."""
        return step_of(self.scale, self.format, self.granularity, self.second_scale)

    def dequantize(self) -> Tensor:
        """Return the (rows, columns) float32 values."""
        return decode(self.codes, self.format).mul_(self.granularity.expand(self.step, self.shape))


def step_of(scale: Tensor, fmt: FloatFormat, granularity: Granularity, second: Tensor | None = None) -> Tensor:
    """Return the float32 steps that ``scale`` stands for, of its shape."""
    if isinstance(granularity, PerBlock) and granularity.scale_dtype != "float32":
        return block_step(scale, second, fmt)
    return scale.to(torch.float32)


def quantize_tensor(
    x: Tensor, scale: Tensor, fmt: FloatFormat, granularity: Granularity, name: str = "tensor", second_scale: Tensor | None = None
) -> QuantizedTensor:
    """Return (rows, columns) ``x`` as codes of ``fmt`` under ``scale``, and ``second_scale`` where block scales have one.

    Raises:
        NonFiniteError: ``x`` or ``scale`` holds NaN or infinity; the message says ``name``.
        ValueError: an element of ``scale`` is not positive, or so small that its reciprocal is infinite.
    """
    step = step_of(scale, fmt, granularity, second_scale)
    require_finite(x, name)
    require_finite(step, f"the scale of {name}")
    inverse = 1.0 / step
    if not bool(((step > 0) & torch.isfinite(inverse)).all()):
        raise ValueError(f"the scale of {name} holds values that are not positive or below 2**-127; all-zero rows take 1")
    # a finite value over a small step may overflow to infinity, which saturates like any other large value
    level = round_to_level(x.float() * granularity.expand(inverse, tuple(x.shape)), fmt)
    codes = encode_levels(level, fmt)
    kept = scale if isinstance(granularity, PerBlock) and granularity.scale_dtype != "float32" else step
    return QuantizedTensor(pack(codes, fmt.bits), kept, fmt, granularity, (x.shape[0], x.shape[1]), second_scale)
