"""What counts as a linear layer: nn.Linear, and the same product with the weight stored transposed."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn


def is_transposed(module: nn.Module) -> bool:
    """Return whether ``module`` is a linear layer that stores its weight (in, out), as GPT-2's Conv1D does."""
    weight = module._parameters.get("weight")
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and weight is not None and weight.dim() == 2


def is_linear(module: nn.Module) -> bool:
    """Return whether ``module`` computes ``x W' + b`` of a weight matrix it owns."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def linear_weight(module: nn.Module) -> Tensor:
    """Return the (out, in) weight of a linear layer, detached."""
    weight = cast(Tensor, module.weight).detach()
    return weight.t().contiguous() if is_transposed(module) else weight


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Return (out, in) of a linear layer, or (rows, columns) of an embedding, which may lie on the meta device."""
    first, second = cast(Tensor, module.weight).shape
    return (int(second), int(first)) if is_transposed(module) else (int(first), int(second))
