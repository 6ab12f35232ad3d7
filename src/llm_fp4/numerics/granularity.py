"""Which elements share a scale. The docstring of each class is the shape of the scale."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from llm_fp4.errors import RecipeError


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


@dataclass(frozen=True)
class PerBlock:
    """One scale for each run of ``block_size`` values in a row: shape (..., ceil(n / block_size)) for (..., n)."""

    block_size: int

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise RecipeError(f"block_size {self.block_size} is impossible; a block holds at least 1 value")

    @property
    def name(self) -> str:
        return f"per_block_{self.block_size}"

    def absmax(self, x: Tensor) -> Tensor:
        padded = pad(x.abs(), (0, -x.shape[-1] % self.block_size))
        return padded.reshape(*x.shape[:-1], padded.shape[-1] // self.block_size, self.block_size).amax(-1)

    def expand(self, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
        return scale.repeat_interleave(self.block_size, -1)[..., : shape[-1]]


Granularity = PerTensor | PerRow | PerChannel | PerBlock


def parse_granularity(name: str) -> Granularity:
    """Return the granularity called ``name``: per_tensor, per_row, per_channel or per_block_N.

    Raises:
        RecipeError: there is no such granularity.
    """
    simple: dict[str, Granularity] = {"per_tensor": PerTensor(), "per_row": PerRow(), "per_channel": PerChannel()}
    if name in simple:
        return simple[name]
    prefix, _, size = name.rpartition("_")
    if prefix == "per_block" and size.isdigit() and int(size) > 0:
        return PerBlock(int(size))
    raise RecipeError(f"unknown granularity {name!r}; choose per_tensor, per_row, per_channel or per_block_N")
