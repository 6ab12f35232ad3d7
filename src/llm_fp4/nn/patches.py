"""Convolutions whose windows lie side by side (patch embeddings) as linears over patches, the same function."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


class PatchLinear(nn.Module):
    """What a convolution computes that reads patches side by side: a linear over the values of each.

    Attributes:
        whole: the convolution, until the linear is quantized; None afterwards.
    """

    whole: nn.Module | None
    _dtype: Tensor

    def __init__(self, convolution: nn.modules.conv._ConvNd) -> None:
        super().__init__()
        object.__setattr__(self, "whole", convolution)  # no child of this module
        weight, bias = convolution.weight.detach().flatten(1), convolution.bias
        self.shape = convolution.weight.shape
        # follows `.to(dtype)`, for model code that casts its pixels to the type of the weight
        self.register_buffer("_dtype", torch.zeros((), dtype=weight.dtype, device=weight.device), persistent=False)
        self.size = tuple(convolution.kernel_size)
        self.patches = nn.Linear(weight.shape[1], len(weight), bias=bias is not None, device="meta")
        self.patches.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.patches.bias = nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """Of the convolution's type and shape, which model code asks for; its values are none."""
        kind = self.patches.weight.dtype if isinstance(self.patches, nn.Linear) else self._dtype.dtype
        return self._dtype.new_empty(self.shape, dtype=kind)  # a new one each time: transformers initializes it in place

    def forward(self, x: Tensor) -> Tensor:
        """Return the (batch, out, …) outputs, one a patch, of (batch, channels, …) ``x``; what fills no patch is left out."""
        counts = [n // k for n, k in zip(x.shape[2:], self.size, strict=True)]
        for axis, (count, k) in enumerate(zip(counts, self.size, strict=True), 2):
            x = x.narrow(axis, 0, count * k)
        split = x.reshape(*x.shape[:2], *(n for pair in zip(counts, self.size, strict=True) for n in pair))
        grid, inside = range(2, split.dim(), 2), range(3, split.dim(), 2)
        rows = split.permute(0, *grid, 1, *inside).reshape(len(x), *counts, x.shape[1] * math.prod(self.size))
        out: Tensor = self.patches(rows).movedim(-1, 1)
        return out


def patch_embeddings(model: nn.Module) -> list[str]:
    """Return the names of all convolutions that read patches of several values side by side."""
    return [n for n, m in model.named_modules() if _reads_patches(m)]


def separate_patches(model: nn.Module, wanted: Callable[[str], bool]) -> list[str]:
    """Put a :class:`PatchLinear` in the place of every convolution that reads patches side by side and is wanted; return their names.

    Args:
        wanted: by the name of the linear, ``...projection.patches``.
    """
    found = [n for n in patch_embeddings(model) if wanted(f"{n}.patches")]
    for name in found:
        parent, _, own = name.rpartition(".")
        convolution = model.get_submodule(name)
        assert isinstance(convolution, nn.modules.conv._ConvNd)
        model.get_submodule(parent)._modules[own] = PatchLinear(convolution)
    return found


def _reads_patches(module: nn.Module) -> bool:
    """Return whether ``module`` is a convolution that :class:`PatchLinear` can stand for; subclasses may compute something else."""
    if not isinstance(module, nn.modules.conv._ConvNd) or type(module) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return False
    plain = module.groups == 1 and set(module.dilation) == {1} and module.padding in ("valid", (0,) * len(module.kernel_size))
    hooked = bool(module._forward_pre_hooks or module._forward_hooks)
    return plain and not hooked and tuple(module.kernel_size) == tuple(module.stride) and math.prod(module.kernel_size) > 1
