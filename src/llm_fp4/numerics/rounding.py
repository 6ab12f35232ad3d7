"""Encode, decode and fake-quantize: the one definition of rounding that every kernel must match.

A code is the nearest level of ``x * (1 / scale)``, both operations in float32, half to even, saturating
(LLM-FP4, arXiv:2310.16836, Eq. 8-9). "Even" is Eq. 8's: even in units of the local spacing, so a format
without mantissa bits rounds 1.5 times a power of two upwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_fp4.errors import NonFiniteError
from llm_fp4.numerics.formats import FloatFormat, levels

_EXPONENT_MASK = 0x7F800000
SMALLEST_STEP = 2.0**-126  # the reciprocal of a smaller step would overflow or be subnormal


def require_finite(x: Tensor, name: str) -> None:
    """Raise NonFiniteError naming ``name``, the count and the first place if ``x`` holds NaN or infinity."""
    finite = torch.isfinite(x)
    if bool(finite.all()):
        return
    bad = (~finite).nonzero()
    place = tuple(int(i) for i in bad[0])
    raise NonFiniteError(
        f"{name} holds {len(bad)} values that are NaN or infinite, the first at {place}; repair the model or data it comes from"
    )


def _spacing(x: Tensor, fmt: FloatFormat) -> Tensor:
    """Return the local grid spacing at ``x`` in steps: 2^max(floor(log2|x|) - m, 0), read off the exponent field."""
    power = (x.view(torch.int32) & _EXPONENT_MASK).view(torch.float32)
    return power.clamp_(min=2.0**fmt.mantissa_bits).mul_(2.0**-fmt.mantissa_bits)


def round_to_level(x: Tensor, fmt: FloatFormat) -> Tensor:
    """Return the nearest level of ``fmt``; half to even, saturating.

    Args:
        x: (...) float32 in steps, that is already divided by its scale.
    Returns:
        (...) float32 holding integers. Unsigned formats send negative values to 0; NaN stays NaN.
    """
    top = float(fmt.max_level)
    x = x.float().clamp(-top if fmt.signed else 0.0, top)
    if fmt.exponent_bits == 1:  # a uniform grid
        return x.round_()
    spacing = _spacing(x, fmt)
    return x.div_(spacing).round_().mul_(spacing)


def soft_level(x: Tensor, fmt: FloatFormat) -> Tensor:
    """Return the level nearest to ``x``, whose gradient is that of clipping: 1 inside the format's range, 0 outside.

    Source: the straight-through estimator of LSQ, arXiv:1902.08153, Eq. 3 and 5: with ``level * scale`` the scale learns too.
    """
    top = float(fmt.max_level)
    clipped = x.clamp(-top if fmt.signed else 0.0, top)
    return clipped + (round_to_level(x.detach(), fmt) - clipped.detach())


def encode(x: Tensor, fmt: FloatFormat, name: str = "tensor") -> Tensor:
    """Return the code of the nearest level of ``fmt``; half to even, saturating; zero has one code, 0.

    Args:
        x: (...) float in steps, that is already divided by its scale.
        name: what to call the tensor in an error.
    Returns:
        (...) uint8 in [0, 2**fmt.bits); the top bit is the sign.
    Raises:
        NonFiniteError: ``x`` holds NaN or infinity.

    >>> encode(torch.tensor([0.4, -2.5, 99.0]), FloatFormat(2, 1)).tolist()
    [0, 10, 7]
    """
    require_finite(x, name)
    return encode_levels(round_to_level(x, fmt), fmt)


def encode_levels(level: Tensor, fmt: FloatFormat) -> Tensor:
    """Return the uint8 codes of float32 ``level``, each of which must be a level of ``fmt``."""
    magnitude = level.abs()
    spacing = _spacing(magnitude, fmt)
    # below 2^m the code is the level; above, each doubling of the spacing adds 2^m codes
    field = torch.log2(spacing) * 2.0**fmt.mantissa_bits
    code = field.add_(magnitude.div_(spacing)).to(torch.uint8)
    if fmt.signed:
        code |= (level < 0).to(torch.uint8) << (fmt.bits - 1)
    return code


def decode(codes: Tensor, fmt: FloatFormat) -> Tensor:
    """Return the levels of uint8 ``codes`` as float32, exactly; multiply by the scale to get values.

    >>> decode(torch.tensor([7, 15], dtype=torch.uint8), FloatFormat(2, 1)).tolist()
    [12.0, -12.0]
    """
    table = levels(fmt).to(device=codes.device, dtype=torch.float32)
    return table[codes.long()]


def fake_quantize(x: Tensor, scale: Tensor, fmt: FloatFormat) -> Tensor:
    """Return ``x`` rounded to ``scale`` times the levels of ``fmt``, float32.

    Args:
        x: (...) float.
        scale: float32, broadcastable to ``x``, every element positive; the step, in the unit of ``x``.
    """
    return round_to_level(x.float() * (1.0 / scale), fmt).mul_(scale)


def scale_of_max(absmax: Tensor, fmt: FloatFormat) -> Tensor:
    """Return the float32 step at which ``absmax`` is the largest value; 1 where ``absmax`` is 0.

    A step below 2**-126 is raised to that, so that its reciprocal stays finite.
    """
    scale = (absmax.float() / float(fmt.max_level)).clamp_(min=SMALLEST_STEP)
    return torch.where(absmax == 0, torch.ones_like(scale), scale)
