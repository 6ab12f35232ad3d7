"""Random orthogonal maps of a width: a Hadamard transform with random signs, and a dense map over the odd part of the width."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_fp4.kernels import hadamard
from llm_fp4.kernels.hadamard import power_of_two


def orthogonal(width: int, generator: torch.Generator) -> Tensor:
    """Return a random orthogonal (width, width) float32 matrix."""
    q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    signed: Tensor = (q * r.diagonal().sign()).float()
    return signed


class Rotation:
    """An orthogonal (width, width) matrix Q, applied without being formed.

    With width = m * 2^k, m odd, it is the Kronecker product of a random orthogonal (m, m) matrix and the Hadamard matrix of
    2^k, after random signs. The same seed gives the same Q. Source: QuaRot, arXiv:2404.00456, §4; odd widths as in QuIP#.
    """

    def __init__(self, width: int, seed: int) -> None:
        self.width, self._size = width, power_of_two(width)
        generator = torch.Generator().manual_seed(seed)
        self._signs = torch.randint(0, 2, (width,), generator=generator).float() * 2 - 1
        self._odd = orthogonal(width // self._size, generator)

    def right(self, x: Tensor) -> Tensor:
        """Return (..., width) ``x Q``, float32."""
        signed = x.float() * self._signs.to(x.device)
        mixed = hadamard(signed).unflatten(-1, (self.width // self._size, self._size))
        return torch.einsum("...ij,ik->...kj", mixed, self._odd.to(x.device)).flatten(-2)

    def left(self, x: Tensor) -> Tensor:
        """Return (width, ...) ``Q' x``: the weight of a linear whose output is to be rotated."""
        return self.right(x.movedim(0, -1)).movedim(-1, 0).contiguous()

    def heads_right(self, x: Tensor) -> Tensor:
        """Return (..., heads * width) ``x`` with each head's channels times Q."""
        return self.right(x.reshape(*x.shape[:-1], x.shape[-1] // self.width, self.width)).flatten(-2)

    def heads_left(self, x: Tensor) -> Tensor:
        """Return (heads * width, ...) ``x`` with each head's rows times Q'."""
        return self.heads_right(x.movedim(0, -1)).movedim(-1, 0).contiguous()
