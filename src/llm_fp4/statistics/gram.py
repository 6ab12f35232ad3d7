"""Matrices summed over tokens. The symmetric ones are summed in their upper half, each rank some of its rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_fp4 import ranks


@dataclass
class Gram:
    """Sums over tokens for the error ``E = target - quantized`` of an input and its quantized form ``Q``.

    With ``D = W - W_hat`` the squared output error is ``W ee W' + 2 D eq' W' + D qq D'`` summed over rows: no
    large terms cancel.

    Attributes:
        qq: (in, in) Q'Q. eq: (in, in) E'Q, None where E is 0. ee: (in, in) E'E, None where E is 0.
    """

    qq: Tensor
    eq: Tensor | None
    ee: Tensor | None


def add_upper(sums: Tensor, rows: Tensor, i: slice) -> None:
    """Add rows ``i`` of X'X to (n, n) ``sums``, from the diagonal on: the other half is its mirror image."""
    sums[i, i.start :].addmm_(rows[:, i].t(), rows[:, i.start :])


def unite_upper(sums: Tensor) -> None:
    """Bring together what ranks added by :func:`add_upper`; the rest is not worth sending."""
    if ranks.alone():
        return
    upper = [sums[i, i.start :] for i in ranks.pieces(len(sums), len(sums))]
    whole = ranks.united(torch.cat([part.flatten() for part in upper]))
    for part, values in zip(upper, whole.split([part.numel() for part in upper]), strict=True):
        part.copy_(values.view_as(part))


def mirror(sums: Tensor) -> None:
    """Copy the upper half of (n, n) ``sums`` onto the lower one."""
    for i in ranks.pieces(len(sums), len(sums)):
        sums[i.stop :, i] = sums[i, i.stop :].t()
