"""Weights as llama.cpp's blocks: Q4_0, MXFP4 and NVFP4, byte for byte.

In every 32 (NVFP4: 16) values the low nibbles are the first half and the high nibbles the second. Source: ggml's
``ggml-common.h`` (block_q4_0, block_mxfp4, block_nvfp4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_fp4.checkpoint import ModuleEntry
from llm_fp4.numerics import QuantizedTensor, decode, parse, scale_bytes

Q4_0, MXFP4, NVFP4, F32 = "Q4_0", "MXFP4", "NVFP4", "F32"
_E2M1, _E1M2 = parse("e2m1"), parse("e1m2")
_KINDS = {(_E2M1, 32, "e8m0"): (MXFP4, 32), (_E2M1, 16, "e4m3"): (NVFP4, 64), (_E1M2, 32, "float16"): (Q4_0, 32)}


def block_type(entry: ModuleEntry) -> str | None:
    """Return the type that can hold the weight, scales apart, or None."""
    if entry.blocks is None:
        return Q4_0 if entry.format == _E1M2 and entry.shape[1] % 32 == 0 else None
    kind, multiple = _KINDS.get((entry.format, entry.blocks.block_size, entry.blocks.scale_dtype), (None, 1))
    return kind if entry.shape[1] % multiple == 0 else None


def half_scales(weight: QuantizedTensor) -> Tensor | None:
    """Return the (rows, blocks of 32) float16 steps of an E1M2 weight, or None where float16 would round them."""
    step = weight.step.reshape(weight.shape[0], -1)
    half = step.to(torch.float16)
    if not torch.equal(half.float(), step):
        return None
    return half.expand(-1, weight.shape[1] // 32)


def block_bytes(weight: QuantizedTensor, kind: str) -> Tensor:
    """Return the (rows, bytes) uint8 of a weight in blocks of ``kind``, one of Q4_0, MXFP4 and NVFP4."""
    rows, columns = weight.shape
    size = 16 if kind == NVFP4 else 32
    if kind == Q4_0:
        nibbles = (decode(weight.codes, weight.format) + 8).to(torch.uint8)
        half = half_scales(weight)
        assert half is not None
        scale = half.contiguous().view(torch.uint8).reshape(rows, columns // size, 2)
    else:
        nibbles, scale = weight.codes, scale_bytes(weight.scale).reshape(rows, columns // size, 1)
    halves = nibbles.reshape(rows, columns // size, 2, size // 2)
    packed = halves[:, :, 0] | (halves[:, :, 1] << 4)  # (rows, blocks, size / 2)
    if kind != NVFP4:
        return torch.cat((scale, packed), -1).flatten(1)
    # four scales ahead of the codes of 64 values
    return torch.cat((scale.reshape(rows, -1, 4), packed.reshape(rows, -1, 32)), -1).flatten(1)
