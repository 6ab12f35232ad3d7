"""The pre-shifted exponent bias: a power-of-two scale for each input channel under one real scale.

Source: LLM-FP4, arXiv:2310.16836, Eq. 13-15.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_fp4.numerics import FloatFormat


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
