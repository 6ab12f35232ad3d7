"""QuantEmbedding: rows of packed codes, decoded as they are looked up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llm_fp4.nn.linear import PackedModule
from llm_fp4.numerics import FloatFormat, QuantizedTensor, decode, unpack


class QuantEmbedding(PackedModule):
    """A table of (num_embeddings, embedding_dim) 4- to 8-bit codes with one scale a row."""

    _dtype: Tensor

    def __init__(
        self, num_embeddings: int, embedding_dim: int, fmt: FloatFormat, device: Any = None, dtype: torch.dtype = torch.float32,
        multiplier: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(num_embeddings, embedding_dim, fmt, device)
        self.num_embeddings, self.embedding_dim, self.multiplier = num_embeddings, embedding_dim, multiplier
        # follows `.to(dtype)`, so that rows come out in the model's dtype
        self.register_buffer("_dtype", torch.zeros((), dtype=dtype, device=device), persistent=False)

    @classmethod
    def from_quantized(cls, weight: QuantizedTensor, dtype: torch.dtype, multiplier: float = 1.0) -> QuantEmbedding:
        """Return the table of a quantized weight whose rows come out in ``dtype``."""
        table = cls(*weight.shape, weight.format, weight.packed.device, dtype, multiplier)
        table.weight_packed, table.weight_scale = weight.packed, weight.scale
        return table

    def forward(self, ids: Tensor) -> Tensor:
        codes = unpack(self.weight_packed[ids], self.weight_format.bits, self.embedding_dim)
        rows = decode(codes, self.weight_format) * self.weight_scale[ids].unsqueeze(-1)
        return (rows if self.multiplier == 1.0 else rows * self.multiplier).to(self._dtype.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, weight={self.weight_format}"
