"""QuantizedTensor: packed codes and their scales, a plain object."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_fp4.errors import UnsupportedError
from llm_fp4.numerics.formats import FloatFormat
from llm_fp4.numerics.granularity import Granularity
from llm_fp4.numerics.packing import pack, packed_width, unpack
from llm_fp4.numerics.rounding import decode, encode_levels, require_finite, round_to_level


@dataclass(frozen=True)
class QuantizedTensor:
    """A (rows, columns) tensor stored as codes: ``value = scale * level[code]``.

    Attributes:
        packed: (rows, packed_width(columns, bits)) uint8.
        scale: float32 of the granularity's shape, the step in the unit of the values.
        second_scale: a float32 scale () over ``scale``, for two-level block formats; None elsewhere.
    """

    packed: Tensor
    scale: Tensor
    format: FloatFormat
    granularity: Granularity
    shape: tuple[int, int]
    second_scale: Tensor | None = None

    def __post_init__(self) -> None:
        if self.second_scale is not None:
            raise UnsupportedError("second_scale (two-level block scales) is not implemented in this version")
        if tuple(self.packed.shape) != (self.shape[0], packed_width(self.shape[1], self.format.bits)):
            raise ValueError(f"packed is {tuple(self.packed.shape)}, which does not hold {self.shape} in {self.format}")

    @property
    def codes(self) -> Tensor:
        """(rows, columns) uint8."""
        return unpack(self.packed, self.format.bits, self.shape[1])

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scale.nbytes

    def dequantize(self) -> Tensor:
        """Return the (rows, columns) float32 values."""
        return decode(self.codes, self.format).mul_(self.granularity.expand(self.scale, self.shape))


def quantize_tensor(x: Tensor, scale: Tensor, fmt: FloatFormat, granularity: Granularity, name: str = "tensor") -> QuantizedTensor:
    """Return (rows, columns) ``x`` as codes of ``fmt`` under ``scale``.

    Raises:
        NonFiniteError: ``x`` or ``scale`` holds NaN or infinity; the message says ``name``.
        ValueError: an element of ``scale`` is not positive, or so small that its reciprocal is infinite.
    """
    scale = scale.to(torch.float32)
    require_finite(x, name)
    require_finite(scale, f"the scale of {name}")
    inverse = 1.0 / scale
    if not bool(((scale > 0) & torch.isfinite(inverse)).all()):
        raise ValueError(f"the scale of {name} holds values that are not positive or below 2**-127; all-zero rows take 1")
    # a finite value over a small step may overflow to infinity, which saturates like any other large value
    level = round_to_level(x.float() * granularity.expand(inverse, tuple(x.shape)), fmt)
    codes = encode_levels(level, fmt)
    return QuantizedTensor(pack(codes, fmt.bits), scale, fmt, granularity, (x.shape[0], x.shape[1]))
