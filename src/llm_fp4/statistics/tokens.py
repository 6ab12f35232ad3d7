"""Token rows of an input site in a file that is mapped, not read: memory does not grow with the number of calibration tokens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from llm_fp4 import ranks

CHUNK = 4096  # tokens per step of every streaming sum: 127 * 127 * 4096 fits int32


class TokenStore:
    """Rows of (tokens, channels) float32 in a file: appended once, batch after batch, then read through a shared mapping.

    Of several ranks each appends the batches that are its own, to a file of its own; :meth:`settle` puts them in order.
    """

    def __init__(self, path: Path, channels: int) -> None:
        self.path, self.channels, self.tokens = path, channels, 0
        self._part = path if ranks.alone() else path.with_name(f"{path.name}.{ranks.number()}")
        self._file = self._part.open("wb")

    def append(self, rows: Tensor) -> None:
        """Append (n, channels) rows."""
        self._file.write(rows.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        self.tokens += len(rows)

    def settle(self, counts: list[int]) -> None:
        """End the appending; on return all rows of all ranks are in the file, in the order of their batches.

        Args:
            counts: rows of each batch, of other ranks' batches too.
        """
        self._file.close()
        if not ranks.alone():
            starts = [0, *accumulate(counts)]
            whole = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)  # another rank may have made it
            with self._part.open("rb") as part, open(whole, "wb") as file:
                for batch in ranks.mine(len(counts)):
                    file.seek(4 * self.channels * starts[batch])
                    file.write(part.read(4 * self.channels * counts[batch]))
            self._part.unlink()
            self.tokens = starts[-1]
            ranks.wait()

    @cached_property
    def rows(self) -> Tensor:
        """(tokens, channels) float32 over the file's pages; reading ends the appending."""
        self._file.close()
        flat = torch.from_file(str(self.path), shared=True, size=self.tokens * self.channels, dtype=torch.float32)
        return flat.view(self.tokens, self.channels)

    def chunks(self) -> Iterator[Tensor]:
        """Yield at most :data:`CHUNK` rows at a time, in order."""
        yield from torch.split(self.rows, CHUNK)

    def delete(self) -> None:
        """Remove the file, once every rank has come here."""
        self._file.close()
        self.__dict__.pop("rows", None)
        ranks.first(lambda: self.path.unlink(missing_ok=True))


@dataclass(frozen=True)
class FloatRows:
    """What the float model has at a site, token by token, where other rows arrive through quantized layers.

    Attributes:
        tokens: its rows. change: what they pass, a map of (n, in) rows; None: nothing.
        share: how much of the way from the rows that arrive to these is wanted, 0 to 1.
    """

    tokens: TokenStore
    change: Callable[[Tensor], Tensor] | None = None
    share: float = 1.0

    def chunks(self) -> Iterator[Tensor]:
        """Yield (n, in) rows in order."""
        yield from self.tokens.chunks() if self.change is None else map(self.change, self.tokens.chunks())
