"""Experts held as one tensor with three axes, taken apart into linears that the model's own code runs.

transformers keeps the matrices of all experts of a layer in one parameter, ``gate_up_proj`` (experts, out, in) say, and its
plain implementation multiplies with ``self.gate_up_proj[i]``. Here a list of linears takes the parameter's place. What it gives for
an index stands for a matrix, and a product with it runs the linear: the model's routing, gating and sums stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from llm_fp4.errors import UnsupportedError

_PLAIN = "eager"  # the implementation that goes through the experts one by one
_MATMUL = (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__)


class _Matrix:
    """Stands for the matrix of one expert in a product."""

    def __init__(self, linear: nn.Module, transposed: bool) -> None:
        self.linear, self.transposed = linear, transposed

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        matrix = args[1] if len(args) == 2 else None
        product = func in _MATMUL if isinstance(matrix, _Matrix) and matrix.transposed else func is nn.functional.linear
        if not isinstance(matrix, _Matrix) or not product or kwargs:
            raise UnsupportedError(
                f"experts are used in {getattr(func, '__name__', func)}, which is not implemented; leave them in float with --ignore"
            )
        return matrix.linear(args[0])


class ExpertList(nn.ModuleList):
    """The linears of all experts in the place of their one parameter.

    Attributes:
        whole: the parameter, until the linears are quantized; None afterwards.
        transposed: whether the parameter holds (experts, in, out).
    """

    whole: nn.Parameter | None

    def __init__(self, whole: nn.Parameter, transposed: bool) -> None:
        super().__init__()
        object.__setattr__(self, "whole", whole)  # no parameter of this module
        self.before: str | None = None  # the implementation of the experts that the model had
        self.transposed = transposed
        for part in whole:
            weight = part.detach().t() if transposed else part.detach()
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            self.append(linear)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, Tensor):
            return _Matrix(super().__getitem__(int(index)), self.transposed)
        return super().__getitem__(index)


def fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield (module name, module, parameter name) of every parameter that holds the matrices of several experts.

    These are the parameters of three axes of modules whose class runs through transformers' experts interface.
    """
    for name, module in model.named_modules():
        if hasattr(getattr(module, "config", None), "_experts_implementation") and hasattr(module, "is_transposed"):
            for own, parameter in list(module._parameters.items()):
                if parameter is not None and parameter.dim() == 3:
                    yield name, module, own


def take_apart(module: nn.Module, own: str) -> ExpertList:
    """Put an :class:`ExpertList` in the place of the parameter ``own`` of ``module``, and return it."""
    experts = ExpertList(cast(nn.Parameter, module._parameters.pop(own)), bool(module.is_transposed))
    module.add_module(own, experts)
    config = cast(Any, module.config)
    experts.before, config._experts_implementation = config._experts_implementation, _PLAIN
    return experts


def join_experts(module: nn.Module, own: str, experts: ExpertList) -> None:
    """Undo :func:`take_apart` of a parameter whose linears are not quantized yet."""
    if experts.whole is None:
        return
    del module._modules[own]
    module.register_parameter(own, experts.whole)
    if experts.before != _PLAIN:
        cast(Any, module.config)._experts_implementation = experts.before


def expert_lists(model: nn.Module) -> dict[str, ExpertList]:
    """Return every list of experts by its name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, ExpertList)}
