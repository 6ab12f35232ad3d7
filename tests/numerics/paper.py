"""Eq. 4-9 of LLM-FP4 (arXiv:2310.16836), read afresh in float64 with a real-valued bias, apart from the library's grids."""

import numpy as np

from llm_fp4.numerics import FloatFormat, formats_of_width

ALL_FORMATS = [f for bits in range(3, 9) for signed in (True, False) for f in formats_of_width(bits, signed)]


def value_of_code(code: int, fmt: FloatFormat, bias: float) -> float:
    """Return the value of one code by Eq. 4: its fields are cut from a string of bits."""
    e, m = fmt.exponent_bits, fmt.mantissa_bits
    bits = f"{code:0{int(fmt.signed) + e + m}b}"
    sign = -1.0 if fmt.signed and bits[0] == "1" else 1.0
    bits = bits[int(fmt.signed) :]
    p, d = int(bits[:e], 2), int(bits[e:] or "0", 2)
    if p == 0:
        return sign * 2.0 ** (1 - bias) * (d / 2**m)
    return sign * 2.0 ** (p - bias) * (1 + d / 2**m)


def values(fmt: FloatFormat, bias: float) -> np.ndarray:
    return np.array([value_of_code(c, fmt, bias) for c in range(2 ** (int(fmt.signed) + fmt.exponent_bits + fmt.mantissa_bits))])


def largest(fmt: FloatFormat, bias: float) -> float:
    """Eq. 6."""
    return 2.0**-bias * (2 - 2.0**-fmt.mantissa_bits) * 2.0 ** (2**fmt.exponent_bits - 1)


def quantize(x: np.ndarray, fmt: FloatFormat, bias: float) -> np.ndarray:
    """Eq. 8-9: clip, take the spacing from the logarithm, round half to even."""
    top = largest(fmt, bias)
    x = np.clip(x.astype(np.float64), -top if fmt.signed else 0.0, top)
    alpha = 2.0**-bias
    with np.errstate(divide="ignore"):
        floor = np.floor(np.log2(np.abs(x)) + bias)
    m = fmt.mantissa_bits
    v = np.where(floor >= 1, 2.0 ** (np.maximum(floor, 1) - m), 2.0 ** (1 - m))
    return alpha * v * np.rint(x / (alpha * v))
