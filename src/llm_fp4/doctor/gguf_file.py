"""GGUF files: weights of the types Q4_0, MXFP4 and NVFP4, block by block.

In each block the low nibbles are the first half of the values, the high nibbles the second. Source: ggml's ``ggml-common.h``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_fp4.doctor.findings import Problem
from llm_fp4.doctor.peers import E2M1
from llm_fp4.doctor.stored import Layers, StoredWeight
from llm_fp4.errors import CheckpointError, UnsupportedError
from llm_fp4.numerics import scale_values

# type → (values a block, bytes of its scales, values that share a scale)
_BLOCKS = {"Q4_0": (32, 2, 32), "MXFP4": (32, 1, 32), "NVFP4": (64, 4, 16)}
_FLOATS = {"F32", "F16", "BF16"}


class GgufFile:
    """A .gguf file."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError:
            raise UnsupportedError("examining a .gguf file needs gguf; install it: pip install 'llm-fp4[gguf]'") from None
        try:
            reader = gguf.GGUFReader(path)
        except Exception as error:
            raise CheckpointError(
                f"{path} cannot be read as GGUF ({str(error).splitlines()[0][:200]}); it is damaged, write it again"
            ) from None
        self.kind, self.problems = "GGUF", list[Problem]()
        self.tensors: dict[str, Any] = {t.name: t for t in reader.tensors}
        field = reader.fields.get("general.architecture")
        self.architecture = "" if field is None else str(field.contents())
        kinds = Counter(t.tensor_type.name for t in reader.tensors)
        others = {k: n for k, n in kinds.items() if k not in _BLOCKS and k not in _FLOATS}
        self.unread = (
            [f"tensors of other types are not examined: {', '.join(f'{n} {k}' for k, n in others.items())}"] if others else []
        )
        self.layers = Layers({
            n.removesuffix(".weight"): tuple(int(s) for s in reversed(t.shape)) for n, t in self.tensors.items()
            if t.tensor_type.name in _FLOATS and len(t.shape) == 2 and n.endswith(".weight")
        })  # fmt: skip

    def weights(self) -> Iterator[StoredWeight]:
        for full, tensor in self.tensors.items():
            if (kind := tensor.tensor_type.name) in _BLOCKS and full.endswith(".weight") and len(tensor.shape) == 2:
                columns, rows = (int(n) for n in tensor.shape)
                yield self._weight(full.removesuffix(".weight"), kind, rows, columns, torch.from_numpy(tensor.data.copy()))

    def _weight(self, name: str, kind: str, rows: int, columns: int, data: Tensor) -> StoredWeight:
        values, scales, size = _BLOCKS[kind]
        blocks = data.view(torch.uint8).reshape(rows, columns // values, scales + values // 2)
        raw = blocks[..., :scales].reshape(rows, -1).contiguous()
        typed = raw.view({"Q4_0": torch.float16, "MXFP4": torch.uint8, "NVFP4": torch.float8_e4m3fn}[kind])
        scale = scale_values(typed)
        packed = blocks[..., scales:].reshape(rows, columns // size, size // 2)

        def codes(part: slice) -> Tensor:
            chosen = packed[part]
            return torch.cat((chosen & 0xF, chosen >> 4), -1).flatten(1)

        sidecar = self.tensors.get(f"{name}.scale")
        second = None if sidecar is None or kind != "NVFP4" else float(sidecar.data.reshape(-1)[0])
        return StoredWeight(
            name, kind, (rows, columns), codes, torch.arange(-8.0, 8.0) if kind == "Q4_0" else E2M1, scale, size,
            {"Q4_0": 2.0**-14, "NVFP4": 2.0**-6}.get(kind, 0.0), 1.0 if second is None else second, second is not None,
            orders={
                "the halves of each block exchanged": torch.arange(size).roll(size // 2),
                "neighbours in one byte": torch.arange(size).view(2, -1).t().flatten(),
            },
            may_be_negative=kind == "Q4_0",
        )  # fmt: skip
