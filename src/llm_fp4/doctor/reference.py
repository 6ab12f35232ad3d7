"""Comparing each weight with the float model's: what a mistake was, told by undoing it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llm_fp4.doctor.findings import Problem
from llm_fp4.doctor.stored import StoredWeight

ROWS = 2048  # of a weight that are compared, spread over it
LIKE, ROUGH = 0.6, 0.9  # cosines; 4 bits rounded to nearest under one scale a row still reach 0.95


def reference_problems(weight: StoredWeight, exact: Tensor | None) -> Iterator[Problem]:
    """Yield what tells ``weight`` from the float tensor it was made from; None: there is none of that name."""
    if exact is None:
        yield Problem("unlike the reference", weight.name, "the reference has no such layer")
        return
    if tuple(exact.shape) != weight.shape:
        yield Problem("shape", weight.name, f"{weight.shape}, the reference's is {tuple(exact.shape)}")
        return
    step = -(-weight.shape[0] // ROWS)
    chosen = torch.arange(0, weight.shape[0], step)
    wanted = exact[chosen].float()
    level = torch.cat([torch.nan_to_num(weight.grid)[weight.codes(slice(int(r), int(r) + 1)).long()] for r in chosen])
    scale = weight.scale[chosen].repeat_interleave(weight.block, -1)[:, : weight.shape[1]]
    value = torch.nan_to_num(level * scale, posinf=0.0, neginf=0.0)
    likeness = _cosine(value, wanted)
    if likeness < LIKE:
        yield _unlike(weight, level, scale, wanted, likeness)
        return
    if likeness < ROUGH:
        yield Problem("rough", weight.name, f"the cosine of values and reference is {likeness:.3f}")
    ratio = float(value.norm() * abs(weight.second) / wanted.norm().clamp_min(1e-30))
    if 0.25 < ratio < 4:
        return
    seen = f"the values are {ratio:.3g} times the reference's"
    if weight.two_level and weight.second and 0.25 < ratio / weight.second**2 < 4:
        yield Problem("global scale inverted", weight.name, f"{seen}; with 1 over the global scale they fit")
    else:
        yield Problem("magnitude", weight.name, seen)


def _unlike(weight: StoredWeight, level: Tensor, scale: Tensor, wanted: Tensor, likeness: float) -> Problem:
    seen = f"the cosine of values and reference is {likeness:.3f}"
    for name, order in weight.orders.items():
        if level.shape[1] % len(order) == 0:
            moved = level.view(len(level), -1, len(order))[..., order].flatten(1)
            if (found := _cosine(moved * scale, wanted)) > max(LIKE, likeness + 0.2):
                return Problem("nibble order", weight.name, f"{seen}; with {name} it is {found:.3f}")
    if (found := _cosine(torch.nan_to_num(level / scale, posinf=0.0, neginf=0.0), wanted)) > max(LIKE, likeness + 0.2):
        return Problem("scale inverted", weight.name, f"{seen}; with 1 over the scales it is {found:.3f}")
    return Problem("unlike the reference", weight.name, seen)


def _cosine(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum() / (a.double().norm() * b.double().norm()).clamp_min(1e-300))
