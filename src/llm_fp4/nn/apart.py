"""What was taken apart into linears, put together again or forgotten."""

from __future__ import annotations

from torch import nn

from llm_fp4.nn.experts import ExpertList, join_experts
from llm_fp4.nn.patches import PatchLinear


def put_together(model: nn.Module) -> None:
    """Undo what made linears of experts and patch embeddings; their parameters are those that were there."""
    for module in list(model.modules()):
        for own, child in list(module.named_children()):
            if isinstance(child, ExpertList):
                join_experts(module, own, child)
            elif isinstance(child, PatchLinear) and child.whole is not None:
                module._modules[own] = child.whole


def forget_wholes(model: nn.Module) -> None:
    """Let the parameters go from which linears were made: their memory is only wanted to undo."""
    for module in model.modules():
        if isinstance(module, ExpertList | PatchLinear):
            object.__setattr__(module, "whole", None)
