"""Recognising input sites that attention-sink tokens dominate.

The first token of a sequence can be thousands of times larger than the others at some sites; one static scale
cannot span both.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sink_ratio(token_absmax: Tensor) -> float:
    """Return the largest over the median token maximum; 1 for an all-zero input.

    Args:
        token_absmax: (tokens,) largest magnitude of each token.
    """
    median = float(token_absmax.median())
    top = float(token_absmax.max())
    return top / median if median > 0 else 1.0 if top == 0 else float("inf")


def balancing_weight(token_absmax: Tensor, ratio: float) -> Tensor:
    """Return a (tokens,) factor on squared errors that keeps tokens beyond ``ratio`` medians from ruling the sum.

    1 up to ``ratio`` times the median token maximum, then falling with its inverse square: a sink token counts about
    as much as one at the limit.
    """
    limit = token_absmax.median() * ratio
    return torch.where(token_absmax > limit, (limit / token_absmax.clamp_min(1e-30)).square(), torch.ones_like(token_absmax))
