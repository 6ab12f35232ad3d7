"""What is measured of each weight in one pass, so that checks across layers need no second one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from llm_fp4.doctor.stored import StoredWeight


@dataclass(frozen=True)
class Measures:
    """Sums over one weight.

    Attributes:
        counts: (codes,) int64. rms: of the values; inverted: with 1 over the scales; NaN where no value is finite.
        rows, columns: (rows,) and (columns,) float64 norms of the values.
        starved: values whose scale is zero though their code is not; idle: scales that are zero over nothing but zeros.
    """

    weight: StoredWeight
    counts: Tensor
    rms: float
    inverted: float
    rows: Tensor
    columns: Tensor
    starved: int
    idle: int


def measure(weight: StoredWeight) -> Measures:
    """Return the sums over ``weight``, some rows at a time."""
    rows, columns = weight.shape
    counts = torch.zeros(len(weight.grid), dtype=torch.int64)
    row_squares, column_squares = torch.zeros(rows, dtype=torch.float64), torch.zeros(columns, dtype=torch.float64)
    inverted, starved, idle = 0.0, 0, 0
    grid = torch.nan_to_num(weight.grid)
    for part in weight.chunks():
        codes = weight.codes(part).long()
        counts += torch.bincount(codes.flatten(), minlength=len(weight.grid))
        level = grid[codes]
        squares = torch.nan_to_num((level * weight.steps(part)).double().square(), posinf=0.0)
        row_squares[part] = squares.sum(1)
        column_squares += squares.sum(0)
        inverted += float(torch.nan_to_num((level * weight.steps(part, inverted=True)).double().square(), posinf=0.0).sum())
        if bool((zero := weight.scale[part] == 0).any()):
            used = pad(level != 0, (0, -columns % weight.block)).view(len(level), -1, weight.block)  # (rows, blocks, block)
            starved += int((used & zero[..., None]).sum())
            idle += int((zero & ~used.any(-1)).sum())
    n = max(1, rows * columns)
    total = float(row_squares.sum())
    return Measures(
        weight, counts, (total / n) ** 0.5, (inverted / n) ** 0.5, row_squares.sqrt(), column_squares.sqrt(), starved, idle
    )
