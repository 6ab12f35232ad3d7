"""Dense packing of codes into bytes: the stored layout of every quantized tensor.

Each row is a little-endian bit stream: code i occupies bits ``i * bits`` and up. For 4 bits this is two
codes a byte, low nibble first (the even column); for 6 bits four codes in three bytes.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor
from torch.nn.functional import pad


def packed_width(columns: int, bits: int) -> int:
    """Return the bytes of a packed row of ``columns`` codes: whole groups that end on a byte."""
    group = 8 // gcd(8, bits)  # codes in a group; it fills group * bits / 8 bytes
    return -(-columns // group) * group * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return ``codes`` packed along the last dimension.

    Args:
        codes: (..., n) uint8, each below 2**bits.
    Returns:
        (..., packed_width(n, bits)) uint8; the tail of the last group is 0.

    >>> pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist()
    [33, 3]
    """
    if bits == 8:
        return codes.clone()
    group = 8 // gcd(8, bits)
    codes = pad(codes, (0, -codes.shape[-1] % group))
    if bits == 4:  # the common case, without the detour through int64
        return codes[..., 0::2] | (codes[..., 1::2] << 4)
    grouped = codes.reshape(*codes.shape[:-1], codes.shape[-1] // group, group).long()  # (..., groups, group)
    word = (grouped << (bits * torch.arange(group, device=codes.device))).sum(-1)
    parts = [(word >> (8 * i) & 0xFF).to(torch.uint8) for i in range(group * bits // 8)]
    return torch.stack(parts, -1).flatten(-2)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Return the first ``columns`` codes of each packed row; the inverse of :func:`pack`.

    >>> unpack(torch.tensor([33, 3], dtype=torch.uint8), 4, 3).tolist()
    [1, 2, 3]
    """
    if bits == 8:
        return packed[..., :columns].clone()
    if bits == 4:
        codes = torch.stack((packed & 0xF, packed >> 4), -1).flatten(-2)
        return codes[..., :columns]
    group = 8 // gcd(8, bits)
    size = group * bits // 8
    grouped = packed.reshape(*packed.shape[:-1], packed.shape[-1] // size, size).long()  # (..., groups, bytes)
    word = (grouped << (8 * torch.arange(size, device=packed.device))).sum(-1)
    parts = [(word >> (bits * i) & (2**bits - 1)).to(torch.uint8) for i in range(group)]
    return torch.stack(parts, -1).flatten(-2)[..., :columns]
