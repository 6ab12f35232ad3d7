"""Which elements share a scale. The docstring of each class is the shape of the scale."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from llm_fp4.errors import RecipeError

_BLOCK = re.compile(r"per_block_([1-9]\d*)(?:_(\w+))?")


@dataclass(frozen=True)
class PerTensor:
    """One scale: shape ()."""

    name = "per_tensor"

    def absmax(self, x: Tensor) -> Tensor:
        return x.abs().amax()

    def expand(self, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
        return scale


@dataclass(frozen=True)
class PerRow:
    """One scale for each row (output channel, embedding row, token): shape (..., rows) for (..., rows, n)."""

    name = "per_row"

    def absmax(self, x: Tensor) -> Tensor:
        return x.abs().amax(-1)

    def expand(self, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
        return scale.unsqueeze(-1)


@dataclass(frozen=True)
class PerChannel:
    """One scale for each channel, the last dimension: shape (n,) for (..., n)."""

    name = "per_channel"

    def absmax(self, x: Tensor) -> Tensor:
        return x.abs().reshape(-1, x.shape[-1]).amax(0)

    def expand(self, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
        return scale


_SCALE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "e4m3": torch.float8_e4m3fn, "e8m0": torch.uint8}


@dataclass(frozen=True)
class PerBlock:
    """One scale for each run of ``block_size`` values in a row: shape (..., ceil(n / block_size)) for (..., n).

    ``scale_dtype`` is how it is stored: "float32" is the step itself; "float16", "e4m3" (under one float32 scale for the
    tensor) and "e8m0" (a power of two, as the byte exponent + 127) are scales in the standards' unit, see ``block_scales``.
    """

    block_size: int
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise RecipeError(f"block_size {self.block_size} is impossible; a block holds at least 1 value")
        if self.scale_dtype not in _SCALE_DTYPES:
            raise RecipeError(f"unknown scale_dtype {self.scale_dtype!r}; choose {', '.join(_SCALE_DTYPES)}")

    @property
    def name(self) -> str:
        return f"per_block_{self.block_size}" + ("" if self.scale_dtype == "float32" else f"_{self.scale_dtype}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return _SCALE_DTYPES[self.scale_dtype]

    @property
    def two_level(self) -> bool:
        """Whether one float32 scale of the tensor lies over the blocks' scales."""
        return self.scale_dtype == "e4m3"

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the shape of the scale of a (rows, columns) tensor."""
        return rows, -(-columns // self.block_size)

    def absmax(self, x: Tensor) -> Tensor:
        padded = pad(x.abs(), (0, -x.shape[-1] % self.block_size))
        return padded.reshape(*x.shape[:-1], padded.shape[-1] // self.block_size, self.block_size).amax(-1)

    def expand(self, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
        return scale.repeat_interleave(self.block_size, -1)[..., : shape[-1]]


Granularity = PerTensor | PerRow | PerChannel | PerBlock


def parse_granularity(name: str) -> Granularity:
    """Return the granularity called ``name``: per_tensor, per_row, per_channel, per_block_N or per_block_N_SCALEDTYPE.

    Raises:
        RecipeError: there is no such granularity.
    """
    simple: dict[str, Granularity] = {"per_tensor": PerTensor(), "per_row": PerRow(), "per_channel": PerChannel()}
    if name in simple:
        return simple[name]
    if (match := _BLOCK.fullmatch(name)) and (match[2] or "float32") in _SCALE_DTYPES:
        return PerBlock(int(match[1]), match[2] or "float32")
    raise RecipeError(f"unknown granularity {name!r}; choose per_tensor, per_row, per_channel or per_block_N (per_block_16_e4m3)")
