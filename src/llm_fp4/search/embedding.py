"""Format and scales of an embedding: row error, joined with the output error of a head that shares it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llm_fp4.numerics import FloatFormat, fake_quantize, scale_of_max
from llm_fp4.plan import WeightPlan
from llm_fp4.recipe import SearchRules
from llm_fp4.search.compensation import compensated
from llm_fp4.search.descent import grids
from llm_fp4.search.weights import choose_weight, output_energy
from llm_fp4.statistics import Gram


def embedding_plan(
    name: str, weight: Tensor, formats: Sequence[FloatFormat], search: SearchRules | None, head_gram: Tensor | None = None
) -> tuple[WeightPlan, Tensor]:
    """Return the plan of an embedding, one scale a row, and its (rows, in) values on that grid.

    Args:
        weight: (rows, in) float32. search: None takes the first format and each row's largest magnitude.
        head_gram: (in, in) X'X of the output head's input where the head shares the weight. Both errors then count
            relative to their own energy: ``|x (w - w_hat)|^2 / |x w|^2 + |w - w_hat|^2 / |w|^2``, summed over rows.
    """
    if search is None:
        scale = scale_of_max(weight.abs().amax(1), formats[0])
        return WeightPlan(name, formats[0], scale), fake_quantize(weight, scale.unsqueeze(1), formats[0])
    energy = _squared(weight)
    gram: Gram | None = None
    penalty = 0.0
    if head_gram is not None:
        gram, penalty = Gram(head_gram, None, None), output_energy(weight, head_gram) / energy
    choice, _ = choose_weight(weight, gram, formats, grids(search)[0], row_penalty=penalty)
    rounded = fake_quantize(weight, choice.scale.unsqueeze(1), choice.format)
    if head_gram is not None and search.compensation != "none":
        joint = head_gram + penalty * torch.eye(len(head_gram), device=head_gram.device)
        joint_gram = Gram(joint, None, None)
        rounded, choice.scale = compensated(weight, joint_gram, choice.scale, choice.format, search)
    return WeightPlan(name, choice.format, choice.scale, _squared(weight - rounded) / energy), rounded


def _squared(x: Tensor) -> float:
    """Return the sum of squares of (rows, in) ``x``, at least 1e-30, without a copy of its size."""
    return max(float(x.norm(dim=1).double().square().sum()), 1e-30)
