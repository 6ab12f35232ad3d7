"""A general linear map of an input's channels, small enough to apply as the input arrives."""

from __future__ import annotations

from torch import Tensor


def split_width(width: int) -> tuple[int, int]:
    """Return the factors (a, b) of ``width`` that lie closest together, a at most b.

    >>> split_width(576), split_width(1536), split_width(7)
    ((24, 24), (32, 48), (1, 7))
    """
    a = max(d for d in range(1, int(width**0.5) + 1) if width % d == 0)
    return a, width // a


def kronecker(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return (..., a * b) float32 ``x`` times the Kronecker product of ``left`` (a, a) and ``right`` (b, b).

    It costs a + b multiplications a channel. Source: FlatQuant, arXiv:2410.09426, Eq. 3.
    """
    wide = x.float().reshape(*x.shape[:-1], len(left), len(right))
    mapped: Tensor = left.t() @ (wide @ right)
    return mapped.reshape(x.shape)
