"""Floating-point number formats of 3 to 8 bits as integer grids.

Source: LLM-FP4, arXiv:2310.16836, Eq. 4-9. A real-valued exponent bias is a scale: with the step
``2**(1 - mantissa_bits - bias)`` every value is the step times a small integer, the *level*. The rest of
the project speaks of scales (the step) and levels only; the bias lives in this file and in the paper's
search grid.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from llm_fp4.errors import RecipeError

_NAME = re.compile(r"(u?)e(\d)m(\d)")
_INT_NAME = re.compile(r"(u?)int(\d)")


@dataclass(frozen=True, order=True)
class FloatFormat:
    """The format EeMm: no infinity, no NaN, subnormals at exponent field 0.

    Codes are ``sign | exponent field | mantissa``; the integer grid of E2M1 is 0 1 2 3 4 6 8 12, one
    grid step is the smallest subnormal (the OCP scale of E2M1 is twice this step). The grid of E1Mm is
    that of a symmetric integer: E1M2 is INT4 from -7 to 7, E1M6 is INT8 from -127 to 127.

    Raises:
        RecipeError: fewer than 3 or more than 8 bits, or a largest level of 2**63 or more (E7M0, E6M1).
    """

    exponent_bits: int
    mantissa_bits: int
    signed: bool = True

    def __post_init__(self) -> None:
        if self.exponent_bits < 1 or self.mantissa_bits < 0:
            raise RecipeError(f"format {self.name} does not exist; give it at least 1 exponent bit, such as e2m1")
        if not 3 <= self.bits <= 8:
            raise RecipeError(f"format {self.name} has {self.bits} bits; formats of 3 to 8 bits exist, such as e2m1 or e4m3")
        if self.max_level >= 2**63:
            raise RecipeError(f"format {self.name} spans more than 2**63 steps; give it fewer exponent bits, such as e5m2")

    @property
    def bits(self) -> int:
        return int(self.signed) + self.exponent_bits + self.mantissa_bits

    @property
    def name(self) -> str:
        return f"{'' if self.signed else 'u'}e{self.exponent_bits}m{self.mantissa_bits}"

    @property
    def max_level(self) -> int:
        """The largest level, in steps."""
        # (2 - 2^-m) · 2^(2^e - 1) / 2^(1-m) = (2^(m+1) - 1) · 2^(2^e - 2); E2M1: 3 · 2^2 = 12
        return int((2 ** (self.mantissa_bits + 1) - 1) * 2 ** (2**self.exponent_bits - 2))

    @property
    def standard_step(self) -> float:
        """The smallest subnormal under the standards' bias 2^(e-1) - 1: 0.5 for E2M1, whose largest value is then 6."""
        return float(2.0 ** (2 - self.mantissa_bits - 2 ** (self.exponent_bits - 1)))

    @property
    def max_shift(self) -> int:
        """The paper's largest channel shift for this activation format, 2^e - 1 (Eq. 15)."""
        return int(2**self.exponent_bits - 1)

    def __str__(self) -> str:
        return self.name

    # bias <-> scale -------------------------------------------------------------------------------

    def scale_of_bias(self, bias: Tensor | float) -> Tensor:
        """Return the step of a real-valued exponent bias: ``2**(1 - m - bias)``."""
        return torch.exp2(1 - self.mantissa_bits - torch.as_tensor(bias, dtype=torch.float64))

    def bias_of_scale(self, scale: Tensor | float) -> Tensor:
        """Return the real-valued exponent bias of a step; the inverse of :meth:`scale_of_bias`."""
        return 1 - self.mantissa_bits - torch.log2(torch.as_tensor(scale, dtype=torch.float64))

    def bias_of_max(self, maximum: Tensor | float) -> Tensor:
        """Return the bias at which ``maximum`` is the largest value (Eq. 7)."""
        top = math.log2(2 - 2**-self.mantissa_bits)
        return 2.0**self.exponent_bits - torch.log2(torch.as_tensor(maximum, dtype=torch.float64)) + top - 1


@cache
def _levels(fmt: FloatFormat) -> tuple[int, ...]:
    m = fmt.mantissa_bits
    magnitude = []
    for code in range(2 ** (fmt.exponent_bits + m)):
        field, fraction = code >> m, code & (2**m - 1)
        magnitude.append(fraction if field == 0 else (2**m + fraction) << (field - 1))
    return tuple(magnitude) + (tuple(-v for v in magnitude) if fmt.signed else ())


def levels(fmt: FloatFormat) -> Tensor:
    """Return the level of every code, a (2**bits,) int64 tensor indexed by code.

    >>> levels(parse("e2m1")).tolist()
    [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]
    """
    return torch.tensor(_levels(fmt), dtype=torch.int64)


def parse(name: str) -> FloatFormat:
    """Return the format called ``name``: "e2m1", unsigned "ue2m2", or "int4" for its equal e1m2.

    >>> parse("int4").name
    'e1m2'

    Raises:
        RecipeError: the name is not of that form or the format does not exist.
    """
    if match := _NAME.fullmatch(name.lower()):
        return FloatFormat(int(match[2]), int(match[3]), signed=not match[1])
    if match := _INT_NAME.fullmatch(name.lower()):
        signed = not match[1]
        return FloatFormat(1, int(match[2]) - 1 - int(signed), signed=signed)
    raise RecipeError(f"unknown number format {name!r}; write e2m1, e4m3, ... (ue2m2 unsigned) or int4, int8")


def formats_of_width(bits: int, signed: bool = True) -> tuple[FloatFormat, ...]:
    """Return every format of that many bits, fewest exponent bits first.

    >>> [f.name for f in formats_of_width(4)]
    ['e1m2', 'e2m1', 'e3m0']

    Raises:
        RecipeError: ``bits`` is not within 3 to 8.
    """
    if not 3 <= bits <= 8:
        raise RecipeError(f"no formats of {bits} bits; choose 3 to 8, or 16 to leave a tensor in float")
    free = bits - int(signed)
    found = []
    for exponent_bits in range(1, free + 1):
        if (2 ** (free - exponent_bits + 1) - 1) * 2 ** (2**exponent_bits - 2) < 2**63:
            found.append(FloatFormat(exponent_bits, free - exponent_bits, signed))
    return tuple(found)
