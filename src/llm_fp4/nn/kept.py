"""Modules some of whose tensors a change of dtype leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Self

from torch import Tensor, nn


class KeepsDtypes(nn.Module):
    """A module whose tensors called ``kept``, where it has them, move between devices but never change their dtype.

    Scales decide how codes are read: ``model.to(torch.bfloat16)`` must not round them.
    """

    kept: Collection[str] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {n: t for n in self.kept if (t := getattr(self, n, None)) is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own has no annotations
        for name, tensor in before.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        return self
