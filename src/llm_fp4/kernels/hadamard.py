"""The fast Walsh-Hadamard transform as a torch.library op: mixing the channels of an input as it arrives."""

from __future__ import annotations

import torch
from torch import Tensor


def power_of_two(width: int) -> int:
    """Return the largest power of two that divides ``width``.

    >>> power_of_two(1536), power_of_two(576), power_of_two(7)
    (512, 64, 1)
    """
    return width & -width


def hadamard_reference(x: Tensor) -> Tensor:
    """Return (..., n) float32 ``x`` with every run of ``power_of_two(n)`` channels multiplied by the orthonormal Hadamard matrix.

    The matrix is symmetric and its own inverse. In Sylvester's order, so H[i, j] is the parity of ``popcount(i & j)``.
    """
    width = x.shape[-1]
    size = power_of_two(width) if width else 1
    out = x.float().reshape(-1, size)
    half = 1
    while half < size:
        pairs = out.view(-1, size // (2 * half), 2, half)
        out = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), 2).view(-1, size)
        half *= 2
    result: Tensor = (out * size**-0.5).view(x.shape)
    return result


hadamard = torch.library.custom_op("llm_fp4::hadamard", hadamard_reference, mutates_args=())


hadamard.register_fake(lambda x: x.new_empty(x.shape, dtype=torch.float32))
