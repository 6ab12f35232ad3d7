"""Exact products of int8 matrices, on whatever multiplies them fastest here."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_EXACT = 1024  # float32 holds sums of so many products of int8: 128 * 128 * 1024 = 2**24


@lru_cache(maxsize=1)
def cpu_multiplies_int8() -> bool:
    """Return whether torch's int8 product has units for it on this CPU.

    Without them (AVX2 alone) it is far slower than one in float32.
    """
    return bool(getattr(torch.cpu, "_is_vnni_supported", lambda: False)())


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """Return the exact (n, m) int32 of (n, k) int8 times (m, k) int8 transposed.

    On CPUs without units for int8 it is summed in float32, in pieces of ``k`` that float32 holds exactly.
    """
    if a.shape[0] == 0 or a.shape[1] == 0 or b.shape[0] == 0:
        return torch.zeros((a.shape[0], b.shape[0]), dtype=torch.int32, device=a.device)
    if a.is_cuda:  # cuBLASLt wants more than 16 rows and multiples of 8
        rows, inner, out = max(17, len(a)), -(-a.shape[1] // 8) * 8, -(-len(b) // 8) * 8
        wide = torch.nn.functional.pad(a, (0, inner - a.shape[1], 0, rows - len(a)))
        tall = torch.nn.functional.pad(b, (0, inner - b.shape[1], 0, out - len(b)))
        return torch._int_mm(wide, tall.t())[: len(a), : len(b)]
    if not cpu_multiplies_int8():
        sums = torch.zeros((len(a), len(b)), dtype=torch.int32, device=a.device)
        for x, y in zip(a.split(_EXACT, 1), b.split(_EXACT, 1), strict=True):
            sums += (x.float() @ y.float().t()).int()
        return sums
    # _int_mm on a CPU takes leading dimensions from the strides, which mean nothing where a dimension is 1: with one
    # channel it returns garbage, and with one row of stride 0 as well (pytorch/pytorch#195066)
    if a.shape[1] == 1:
        return a.int() * b.int().t()
    if len(a) == 1:
        a = a.clone(memory_format=torch.contiguous_format)
    return torch._int_mm(a, b.t())
