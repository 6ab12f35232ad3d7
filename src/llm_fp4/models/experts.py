"""Experts of a float model, taken apart into linears where the recipe quantizes some of them."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from llm_fp4.models.source import WeightSource
from llm_fp4.nn import fused_experts, take_apart


def separate_experts(model: nn.Module, source: WeightSource | None, selects: Callable[[str], bool]) -> dict[str, str]:
    """Take apart every parameter that holds experts of which ``selects`` wants any; return the matrices left whole, by name, and their module.

    An expert's matrix is then a linear of its own: ``...experts.gate_up_proj.3`` for the fourth.

    Args:
        source: told which tensor the parts belong to; None where all weights are in memory. selects: by the name of a module.
    """
    whole: dict[str, str] = {}
    for name, module, own in list(fused_experts(model)):
        parameter = module._parameters[own]
        assert parameter is not None
        parts = [f"{name}.{own}.{i}" for i in range(len(parameter))]
        if not selects(name) or not any(selects(part) for part in parts):
            whole |= dict.fromkeys(parts, name)
            continue
        experts = take_apart(module, own)
        for i, part in enumerate(parts):
            if source is not None:
                source.part(f"{part}.weight", f"{name}.{own}", i, experts.transposed)
    return whole
