"""A quantized weight as a file holds it, whichever tool wrote it: codes, what each code stands for, and scales."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from llm_fp4.doctor.findings import Problem

CHUNK = 1 << 22  # values decoded at once


@dataclass(frozen=True)
class StoredWeight:
    """One weight of a checkpoint.

    Attributes:
        name: of its module. kind: its format and scales, for people.
        shape: (rows, columns).
        codes: gives (n, columns) uint8 codes of the rows of a slice.
        grid: (codes,) float32, what each code is multiplied by the scale to; NaN where a code is none.
        scale: (rows, blocks) float32, as stored but decoded; a row's values share ``block`` by ``block`` one of them.
        smallest: below this a stored scale loses digits (subnormal); 0 where it cannot. largest: of what it can store.
        second: the factor over all scales, 1 where there is none; two_level: whether there is one.
        input_second: the factor over the block scales of the input, None where it has none.
        orders: other orders in which the codes of a byte or word may have been meant: name → (group,) columns within a group.
        may_be_negative: whether a negative scale is no mistake.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    codes: Callable[[slice], Tensor]
    grid: Tensor
    scale: Tensor
    block: int
    smallest: float = 0.0
    second: float = 1.0
    two_level: bool = False
    input_second: float | None = None
    orders: dict[str, Tensor] = field(default_factory=dict)
    may_be_negative: bool = False

    def chunks(self) -> Iterator[slice]:
        """Yield slices of rows small enough to decode at once."""
        step = max(1, CHUNK // max(1, self.shape[1]))
        for start in range(0, self.shape[0], step):
            yield slice(start, min(start + step, self.shape[0]))

    def steps(self, rows: slice, inverted: bool = False) -> Tensor:
        """Return (n, columns) float32, what the grid's values of these rows are multiplied by, or 1 over the stored scale."""
        scale = self.scale[rows]
        scale = 1.0 / scale if inverted else scale
        return scale.repeat_interleave(self.block, -1)[:, : self.shape[1]] * self.second

    def values(self, rows: slice = slice(None)) -> Tensor:
        """Return (n, columns) float32 values of the rows."""
        return self.grid[self.codes(rows).long()] * self.steps(rows)


@dataclass
class Layers:
    """What a checkpoint holds beside its quantized weights.

    Attributes:
        floats: linear layers and embeddings in float, name → shape. ignored: those of them that its own list leaves in float;
            None where the format has no such list.
    """

    floats: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ignored: set[str] | None = None


class Checkpoint(Protocol):
    """A checkpoint that can be examined, weight by weight."""

    kind: str  # what wrote it, for people
    layers: Layers
    problems: list[Problem]  # seen in the headers already
    unread: list[str]  # sentences on what is not examined

    def weights(self) -> Iterator[StoredWeight]:
        """Yield every quantized weight whose tensors fit."""
        ...


def pairs(columns: int = 2) -> Tensor:
    """Return the order of ``columns`` codes whose neighbours are exchanged."""
    return torch.arange(columns).view(-1, 2).flip(1).flatten()
