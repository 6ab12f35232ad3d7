"""Block-wise reconstruction: rounding, row scales and input scales of a quantized block learned by the error of the block's output.

Source: BRECQ, arXiv:2102.05426 (the block is the unit of error), on the relaxed rounding of AdaRound, arXiv:2004.10568. What the search and
error compensation chose is where it starts.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from llm_fp4 import ranks
from llm_fp4.calibration import no_parameter_gradients
from llm_fp4.models import placed
from llm_fp4.nn import QuantLinear
from llm_fp4.pipeline.sites import Decided
from llm_fp4.pipeline.steps import BlockSteps, Step
from llm_fp4.progress import Progress, silent
from llm_fp4.recipe import Recipe
from llm_fp4.transforms import SoftRoundedLinear, SoftSite

STAGE = "learn a block's rounding"
_SPEED, _SCALE_SPEED = 0.2, 1e-3  # first steps of the logits, and of the scales' logarithms
_HOT, _COLD = 1.0, 0.02  # temperatures of the first step and of the last
_JUDGED = 8  # every so manieth step judges and teaches nothing, where there are as many


def reconstruct(
    model: nn.Module, name: str, sites: Sequence[Decided], steps: BlockSteps, recipe: Recipe, plans: dict[str, Any],
    tell: Progress = silent,
) -> None:  # fmt: skip
    """Learn the rounding of a block's weights; the sites' decisions change in place where the block's error falls.

    Args:
        model: has the quantized layers of ``sites`` in its block ``name``. steps: made while that block was float.
        tell: hears of every pass over the data. plans: gains the changed decisions and "reconstruction": the relative error before
            and after, on steps that taught nothing where there are enough ("held_back").
    """
    soft, inputs = {}, []
    for site in sites:
        plan = site.result.input
        inputs.append(shared := SoftSite(plan, next(iter(site.weights.values())).device))
        for n, weight in site.weights.items():
            layer = model.get_submodule(n)
            assert isinstance(layer, QuantLinear)
            smoothed = weight if plan is None or plan.smooth is None else weight * plan.smooth
            bias = None if layer.bias is None else layer.bias.float()
            soft[n] = SoftRoundedLinear(smoothed, layer.weight, site.result.weights[n], bias, shared)
    taught = list(steps)
    apart = len(taught) >= _JUDGED
    judged = taught[::_JUDGED] if apart else taught
    taught = [s for i, s in enumerate(taught) if i % _JUDGED or not apart]
    generator = torch.Generator().manual_seed(recipe.seed ^ zlib.crc32(f"{name} rounding".encode()))
    with no_parameter_gradients(steps.block), placed(model, soft):
        before = _loss(steps, judged, inputs)
        with torch.enable_grad():
            _descend(steps, taught, soft, inputs, recipe.search.reconstruction_epochs, generator, tell)
        after = _loss(steps, judged, inputs)
    before, after = ranks.leaders(torch.tensor([before, after], dtype=torch.float64)).tolist()
    if after < before:
        for site, shared in zip(sites, inputs, strict=True):
            site.result.input = shared.learned()
            if site.result.input is not None:
                site.result.input.scale = ranks.leaders(site.result.input.scale)
            for n in site.weights:
                site.result.rounded[n], site.result.weights[n].scale = map(ranks.leaders, soft[n].learned())
            plans["weights"] |= {n: {**plans["weights"][n], **site.result.weights[n].to_json()} for n in site.weights}
            if site.result.input is not None:
                plans["inputs"][site.result.input.name] = site.result.input.to_json()
    plans["reconstruction"] = {"before": before, "after": after, "kept": after < before, "held_back": apart}


def _loss(steps: BlockSteps, some: Sequence[Step], inputs: Sequence[SoftSite]) -> float:
    for site in inputs:
        site.forget()
    return sum(float(steps.loss(step)) for step in some) / len(some)


def _descend(
    steps: BlockSteps, taught: Sequence[Step], soft: dict[str, SoftRoundedLinear], inputs: Sequence[SoftSite], epochs: int, generator: torch.Generator,
    tell: Progress,
) -> None:  # fmt: skip
    """Learn everything together, while the rounding cools down; it is cold at the end."""
    scales = [site.log_scale for site in inputs] + [layer.log_scale for layer in soft.values() if layer.scales_learn]
    logits = {"params": [layer.logit for layer in soft.values()], "lr": _SPEED, "betas": (0.9, 0.99)}
    optimizer = torch.optim.Adam([logits, {"params": scales, "lr": _SCALE_SPEED}])
    order = [i for _ in range(epochs) for i in torch.randperm(len(taught), generator=generator).tolist()]
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, len(order))
    for done, i in enumerate(order):
        if done % len(taught) == 0:
            tell(STAGE, done // len(taught), epochs)
        for layer in soft.values():
            layer.temperature = _HOT * (_COLD / _HOT) ** (done / len(order))
        for site in inputs:
            site.forget()
        steps.loss(taught[i]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    tell(STAGE, epochs, epochs)
    for layer in soft.values():
        layer.temperature = 0.0
