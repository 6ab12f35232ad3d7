"""The stored scale of every block of a weight, by output error.

Candidates lie around that of the largest magnitude, from clipping it to mapping it to two thirds of the largest value (4
instead of 6 in E2M1), where the values around the top have a finer grid.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from llm_fp4.numerics import FloatFormat, PerBlock, block_step, fake_quantize, neighbour
from llm_fp4.statistics import Gram

_ROWS = 2048  # rows searched at once: bounds the temporaries of a vocabulary-sized weight
_OFFSETS = {"e8m0": range(-1, 2)}  # octaves; for others eighths of an octave: largest value to 8.5 … 4 in E2M1
_OFFSETS |= dict.fromkeys(("e4m3", "float16"), range(-4, 6))
_SWEEPS = 2  # over the blocks of a row, where they are searched jointly


def search_scales(
    weight: Tensor, gram: Gram, fmt: FloatFormat, blocks: PerBlock, start: Tensor, second: Tensor | None, *, joint: bool
) -> Tensor:
    """Return the stored (out, blocks) scales of least output error among the neighbours of ``start``.

    Args:
        weight: (out, in) float32. joint: count what the errors of a row's blocks do to each other and to the input's error.
    """
    size, columns = blocks.block_size, weight.shape[1]
    short = -columns % size
    qq = pad(gram.qq, (0, short, 0, short))
    crossed = weight @ gram.eq if joint and gram.eq is not None else torch.zeros_like(weight)
    out = []
    for start_row in range(0, len(weight), _ROWS):
        rows = slice(start_row, start_row + _ROWS)
        own = _Blocks(pad(weight[rows], (0, short)), qq, fmt, blocks, start[rows], second)
        offset = own.independent()
        if joint:
            offset = own.jointly(offset, pad(crossed[rows], (0, short)))
        out.append(neighbour(start[rows], offset, blocks))
    return torch.cat(out)


class _Blocks:
    """Rows of a weight cut into blocks, with the errors that each candidate scale leaves in them."""

    def __init__(
        self, weight: Tensor, qq: Tensor, fmt: FloatFormat, blocks: PerBlock, start: Tensor, second: Tensor | None
    ) -> None:
        """Args: weight (rows, in), qq (in, in), both padded to whole blocks; start (rows, blocks) stored scales."""
        size = blocks.block_size
        self._size, self._qq, self._format, self._weight = size, qq, fmt, weight
        self._offsets = list(_OFFSETS[blocks.scale_dtype])
        self._steps = torch.stack(
            [block_step(neighbour(start, o, blocks), second, fmt) for o in self._offsets]
        )  # (c, rows, blocks)
        self._own = torch.stack([qq[i : i + size, i : i + size] for i in range(0, len(qq), size)])  # (blocks, size, size)

    def _errors(self, block: int) -> Tensor:
        """Return (candidates, rows, size) ``w - w_hat`` of one block."""
        w = self._weight[:, block * self._size : (block + 1) * self._size]
        return w - fake_quantize(w.expand(len(self._offsets), *w.shape), self._steps[:, :, block, None], self._format)

    def _offset(self, candidate: Tensor) -> Tensor:
        return torch.tensor(self._offsets, device=candidate.device)[candidate]

    def independent(self) -> Tensor:
        """Return the (rows, blocks) candidate offsets of least error, each block for itself."""
        best = []
        for b, own in enumerate(self._own):
            d = self._errors(b)
            best.append(((d @ own).mul_(d)).sum(-1).argmin(0))
        return self._offset(torch.stack(best, 1))

    def jointly(self, offset: Tensor, crossed: Tensor) -> Tensor:
        """Return the (rows, blocks) offsets after descent over blocks, from ``offset``; ``crossed`` (rows, in) is ``W eq``."""
        candidate = offset - self._offsets[0]
        count = range(len(self._own))
        row = torch.arange(len(offset), device=offset.device)
        d = torch.cat([self._errors(b)[candidate[:, b], row] for b in count], 1)  # (rows, in)
        inner = (d @ self._qq).add_(crossed)
        for _ in range(_SWEEPS):
            for b in count:
                here, own = slice(b * self._size, (b + 1) * self._size), self._own[b]
                trial = self._errors(b)
                others = inner[:, here] - d[:, here] @ own
                candidate[:, b] = ((trial @ own).add_(others, alpha=2.0).mul_(trial)).sum(-1).argmin(0)
                new = trial[candidate[:, b], row]
                inner.addmm_(new - d[:, here], self._qq[here])
                d[:, here] = new
        return self._offset(candidate)
