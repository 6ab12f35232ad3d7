"""Matrix products that only rank candidates: bfloat16 where the machine multiplies it faster than float32.

All losses are written in terms of rounding errors (no large terms cancel), so bfloat16's relative error of 2**-9 in each
term is far below the differences between candidates. The error of the winner is computed in float32.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=1)
def _cpu_has_bfloat16() -> bool:
    supported = (getattr(torch.cpu, f"_is_{name}_supported", lambda: False)() for name in ("avx512_bf16", "amx_tile"))
    return any(supported)


def ranking_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which candidates are compared on ``device``."""
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else _cpu_has_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def as_operand(x: Tensor) -> Tensor:
    """Return ``x`` in the dtype that ranks candidates."""
    return x.to(ranking_dtype(x.device))


def rank_product(a: Tensor, b: Tensor) -> Tensor:
    """Return the float32 product of (n, k) and (k, m), good enough to rank candidates.

    Args:
        b: already an operand (see :func:`as_operand`), so that it is converted once for many products.
    """
    return (a.to(b.dtype) @ b).float()
