"""The pre-shifted exponent bias: a power-of-two scale for each input channel under one real scale.

Source: LLM-FP4, arXiv:2310.16836, Eq. 13-15.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_fp4.numerics import FloatFormat
from llm_fp4.plan import LIMB, TWO_LIMBS
from llm_fp4.recipe import ShiftRange


def shift_limits(fmt: FloatFormat, shift_range: ShiftRange) -> list[int]:
    """Return the largest shifts to try for inputs of ``fmt``, the smallest first.

    "format" is the paper's 2^e - 1, "int8" the largest K with ``max_level * 2**K <= 127``, "search" is 0, both of them,
    "every" all up to the second, and the first.

    Those of unsigned formats stay within two int8 limbs.

    >>> shift_limits(FloatFormat(1, 2), "search"), shift_limits(FloatFormat(2, 1), "every"), shift_limits(FloatFormat(3, 0), "int8")
    ([0, 1, 4], [0, 1, 2, 3], [0])
    """
    budget = max((LIMB // fmt.max_level).bit_length() - 1, 0)  # 127 // 12 = 10: 3 doublings
    both = [fmt.max_shift, budget]
    known = {"format": both[:1], "int8": both[1:], "search": [0, *both], "every": [*both, *range(budget)]}
    most = LIMB if fmt.signed else max((TWO_LIMBS // fmt.max_level).bit_length() - 1, 0)  # ue3m1: 192 * 2**6 = 12,288
    return sorted({min(k, most) for k in ([shift_range] if isinstance(shift_range, int) else known[shift_range])})


def channel_shift(channel_absmax: Tensor, fmt: FloatFormat, max_shift: int) -> Tensor:
    """Return k, the (in,) uint8 shift of each channel, at most ``max_shift``.

    ``k_j = clip(round(b_j) - round(min b), 0, max_shift)`` with b_j the bias of the channel's own maximum (Eq. 7).
    A dead channel (maximum 0) takes the largest shift: its bias is unbounded.

    >>> channel_shift(torch.tensor([8.0, 2.0, 0.01]), FloatFormat(2, 1), 3).tolist()
    [0, 2, 3]
    """
    tiny = torch.finfo(torch.float32).tiny
    bias = fmt.bias_of_max(channel_absmax.double().clamp_min(tiny))
    return (bias.round() - bias.min().round()).clamp(0, max_shift).to(torch.uint8)
