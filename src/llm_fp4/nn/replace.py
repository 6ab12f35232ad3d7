"""Exchanging float modules of a model for empty quantized ones, and sharing packed weights and rounded inputs."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from llm_fp4.errors import CheckpointError
from llm_fp4.nn.embedding import QuantEmbedding
from llm_fp4.nn.linear import PackedModule, QuantLinear
from llm_fp4.nn.linears import is_linear, linear_shape
from llm_fp4.nn.shared import InputSite
from llm_fp4.numerics import FloatFormat, PerBlock
from llm_fp4.plan import InputSpec


def replace_module(
    model: nn.Module, name: str, fmt: FloatFormat, spec: InputSpec | None, shape: tuple[int, int], multiplier: float = 1.0,
    blocks: PerBlock | None = None,
) -> None:  # fmt: skip
    """Put an empty quantized module in the place of the float module ``name``, on its device and in its dtype.

    Args:
        shape: (rows, columns) that the checkpoint states. multiplier: of an embedding's rows. blocks: of a linear's weight that share a scale.
    Raises:
        CheckpointError: the model has no such linear or embedding, or one of another shape.
    """
    parent_name, _, child = name.rpartition(".")
    try:
        parent, old = model.get_submodule(parent_name), model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(
            f"the checkpoint quantizes {name}, which {type(model).__name__} does not have; they do not belong together"
        ) from None
    if not (is_linear(old) or isinstance(old, nn.Embedding)):
        raise CheckpointError(
            f"the checkpoint quantizes {name}, but that is a {type(old).__name__} here; they do not belong together"
        )
    if linear_shape(old) != shape:
        raise CheckpointError(
            f"{name} is {linear_shape(old)} in the model, the manifest makes it {shape}; they do not belong together"
        )
    weight = cast(Tensor, old.weight)
    device, dtype = weight.device, weight.dtype
    new: PackedModule
    if is_linear(old):
        new = QuantLinear(shape[1], shape[0], fmt, spec, old.bias is not None, device, dtype, blocks)
    else:
        new = QuantEmbedding(*shape, fmt, device, dtype, multiplier)
    parent._modules[child] = new


def borrow_weight(head: PackedModule) -> None:
    """Take ``head``'s own packed weight out of its state dict: :func:`share_weight` will give it another's."""
    head._non_persistent_buffers_set |= {"weight_packed", "weight_scale"}


def share_weight(head: PackedModule, owner: PackedModule) -> None:
    """Let ``head`` read the packed weight of ``owner``."""
    head.weight_packed, head.weight_scale = owner.weight_packed, owner.weight_scale


def share_inputs(model: nn.Module) -> None:
    """Let the quantized linears of each module that were given one input site's rounding share its result.

    Those are siblings with the same description and bit for bit the same scale, shift and factors. Nothing changes in the
    state dict, and a sibling that reads another tensor rounds it for itself.
    """
    for parent in model.modules():
        found: list[tuple[QuantLinear, InputSite]] = []
        for child in parent.children():
            if not isinstance(child, QuantLinear) or child.spec is None or child.input_scale.is_meta:
                continue
            site = next((s for other, s in found if _alike(child, other)), None) or InputSite()
            found.append((child, site))
        for child, site in found:
            child.site = site if sum(s is site for _, s in found) > 1 else None


def _alike(a: QuantLinear, b: QuantLinear) -> bool:
    names = ("input_scale", "input_shift", "input_smooth", "input_left", "input_right")
    pairs = [(getattr(a, n), getattr(b, n)) for n in names]
    return a.spec == b.spec and all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)
