"""Exchanging float modules of a model for empty quantized ones, and sharing packed weights."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from llm_fp4.errors import CheckpointError
from llm_fp4.nn.embedding import QuantEmbedding
from llm_fp4.nn.linear import PackedModule, QuantLinear
from llm_fp4.nn.linears import is_linear, linear_shape
from llm_fp4.numerics import FloatFormat
from llm_fp4.plan import InputSpec


def replace_module(
    model: nn.Module, name: str, fmt: FloatFormat, spec: InputSpec | None, shape: tuple[int, int], multiplier: float = 1.0
) -> None:
    """Put an empty quantized module in the place of the float module ``name``, on its device and in its dtype.

    Args:
        shape: (rows, columns) that the checkpoint states. multiplier: of an embedding's rows.
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
        new = QuantLinear(shape[1], shape[0], fmt, spec, old.bias is not None, device, dtype)
    else:
        new = QuantEmbedding(*shape, fmt, device, dtype, multiplier)
    parent._modules[child] = new


def borrow_weight(head: PackedModule) -> None:
    """Take ``head``'s own packed weight out of its state dict: :func:`share_weight` will give it another's."""
    head._non_persistent_buffers_set |= {"weight_packed", "weight_scale"}


def share_weight(head: PackedModule, owner: PackedModule) -> None:
    """Let ``head`` read the packed weight of ``owner``."""
    head.weight_packed, head.weight_scale = owner.weight_packed, owner.weight_scale
