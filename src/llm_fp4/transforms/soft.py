"""Linears that round as the quantized ones will, with gradients through the rounding, and a map of their input to be learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llm_fp4.kernels import kronecker, split_width
from llm_fp4.numerics import FloatFormat, PerBlock, block_step, max_scale, second_scale, soft_level
from llm_fp4.transforms.inputs import KroneckerTransform
from llm_fp4.transforms.rotation import orthogonal

_START = 2.5  # the sigmoid of it, 0.92, is the share of the largest magnitude that is not clipped
_SMALLEST = 1e-12


class SoftInput(nn.Module):
    """One input site: its map, a Kronecker product that starts as a random orthogonal one, and its clipping.

    Args:
        width: channels.
        learned: False keeps the channels as they are, for comparison. blocks: with scales of blocks instead; no clipping then.

    Attributes:
        top: () largest magnitude of the mapped calibration input, for a static scale; None for a scale per token.
    """

    def __init__(
        self, width: int, fmt: FloatFormat, generator: torch.Generator, learned: bool = True, blocks: PerBlock | None = None
    ) -> None:
        super().__init__()
        self.format, self.learned, self.blocks = fmt, learned, blocks
        self.top: Tensor | None = None
        self.left, self.right = (nn.Parameter(orthogonal(n, generator)) for n in split_width(width))
        self.clip = nn.Parameter(torch.tensor(_START))
        self._read: Tensor | None = None
        self._rounded: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., in) ``x`` mapped and rounded; siblings that read the same tensor share the result."""
        if self._read is not x or self._rounded is None:
            self._read, self._rounded = x, _soft(self.mapped(x), self.format, self.blocks, self.clip, self.top)
        return self._rounded

    def mapped(self, x: Tensor) -> Tensor:
        """Return (..., in) ``x`` mapped."""
        return kronecker(x, self.left, self.right) if self.learned else x

    def weight(self, weight: Tensor) -> Tensor:
        """Return the (out, in) ``weight`` that reads the mapped input."""
        if not self.learned:
            return weight
        left, right = (torch.linalg.inv(m).t() for m in (self.left, self.right))
        return kronecker(weight, left, right)

    def start_as_it_is(self) -> None:
        """Start from the map that changes nothing."""
        for side in (self.left, self.right):
            nn.init.eye_(side)

    def forget(self) -> None:
        """Drop the last rounded input: the parameters have changed."""
        self._read = self._rounded = None

    def transform(self) -> KroneckerTransform:
        """Return the map as it is now, laid out as a checkpoint gives it back: products of another layout round otherwise."""
        left, right = (m.detach().clone(memory_format=torch.contiguous_format) for m in (self.left, self.right))
        return KroneckerTransform(left, right)


class SoftLinear(nn.Module):
    """``y = q(x P) q(W P^-T)' + b`` with one scale a row of the weight, each row's clipping learned, or with scales of blocks.

    Args:
        weight: (out, in) float32. site: of its input, shared with other readers. blocks: of the weight, or None.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, fmt: FloatFormat, site: SoftInput, blocks: PerBlock | None = None
    ) -> None:
        super().__init__()
        self.blocks = blocks
        self.clip = nn.Parameter(torch.full((len(weight), 1), _START, device=weight.device))
        self._float, self._bias, self._format = weight, bias, fmt
        self._site = (site,)  # in a tuple: the site's parameters are its own, not this layer's

    @property
    def weight(self) -> Tensor:
        """(out, in) float32, for model code that asks for a layer's type."""
        return self._float

    def forward(self, x: Tensor) -> Tensor:
        (site,) = self._site
        weight = _soft(site.weight(self._float), self._format, self.blocks, self.clip)
        out: Tensor = nn.functional.linear(site(x), weight, self._bias)
        return out


def _soft(x: Tensor, fmt: FloatFormat, blocks: PerBlock | None, clip: Tensor, top: Tensor | None = None) -> Tensor:
    """Return (..., n) ``x`` rounded under a scale of its own for every row, a share ``clip`` of its largest magnitude, or under
    the static one of ``top``, or those of ``blocks``."""
    if blocks is not None:
        return soft_blocks(x, fmt, blocks)
    top = x.abs().amax(-1, keepdim=True) if top is None else top
    scale = top.clamp_min(_SMALLEST) * (torch.sigmoid(clip) / fmt.max_level)
    return soft_level(x / scale, fmt) * scale


def soft_blocks(x: Tensor, fmt: FloatFormat, blocks: PerBlock) -> Tensor:
    """Return (..., n) ``x`` rounded under the scales that its blocks' largest magnitudes ask for, with the gradient of clipping.

    Scales are rounded themselves; their gradient is that of scales in proportion to the magnitudes.
    """
    size, columns = blocks.block_size, x.shape[-1]
    tiles = nn.functional.pad(x, (0, -columns % size)).unflatten(-1, (-1, size))
    top = tiles.abs().amax(-1)
    with torch.no_grad():
        second = second_scale(top.amax(), fmt) if blocks.two_level else None
        step = block_step(max_scale(top, second, fmt, blocks), second, fmt).clamp_min(_SMALLEST)
    step = (step * (top / top.detach().clamp_min(_SMALLEST))).unsqueeze(-1).clamp_min(_SMALLEST)
    rounded: Tensor = (soft_level(tiles / step, fmt) * step).flatten(-2)[..., :columns]
    return rounded
