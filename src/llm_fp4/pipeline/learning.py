"""Learning the maps of a block's inputs: gradient descent on the error of the block's output while everything is rounded.

Source: FlatQuant, arXiv:2410.09426, §3: a Kronecker-factored affine map for every input, learned block by block.
"""

from __future__ import annotations

import zlib
from functools import partial

import torch
from torch import Tensor, nn

from llm_fp4 import ranks
from llm_fp4.calibration import inputs_of, no_parameter_gradients
from llm_fp4.models import BlockRunner, placed
from llm_fp4.nn import linear_weight
from llm_fp4.numerics import FloatFormat
from llm_fp4.pipeline.steps import BlockSteps
from llm_fp4.progress import Progress, silent
from llm_fp4.recipe import ModuleRule, Recipe
from llm_fp4.search import sink_ratio
from llm_fp4.transforms import KroneckerTransform, SoftInput, SoftLinear

STAGE = "learn the maps of a block's inputs"
_CLIP_SPEED = 5.0  # clipping learns so many times faster than the maps
_COOLED = 0.01  # the last step's share of the first one's length

Linears = dict[str, nn.Module]


def learn_transforms(
    runner: BlockRunner,
    name: str,
    groups: list[list[str]],
    linears: Linears,
    recipe: Recipe,
    steps: BlockSteps,
    tell: Progress = silent,
) -> dict[str, KroneckerTransform]:
    """Return the map of each input site of a block, by the site's name; none where no map beats the channels as they are.

    Args:
        runner: has the block ``name`` next, with real float weights. groups: names of the linears that share an input.
        steps: the block's calibration data. tell: hears of every pass over it.
    """
    rules = {g[0]: recipe.rule(g[0]) for g in groups}
    sites = {s: g for s, g in zip(rules, groups, strict=True) if learnable(rules[s])}
    if not sites:
        return {}
    device = linear_weight(next(iter(linears.values()))).device
    generator = torch.Generator().manual_seed(recipe.seed ^ zlib.crc32(name.encode()))
    weight_rules = {n: recipe.rule(n) for g in sites.values() for n in g}

    def made(learned: bool) -> tuple[dict[str, SoftInput], Linears]:
        inputs = {}
        for s in sites:
            width, fmt = linear_weight(linears[s]).shape[1], _format(rules[s].input_formats)
            inputs[s] = SoftInput(width, fmt, generator, learned, rules[s].input_blocks).to(device)
        soft: Linears = {}
        for s, n in ((s, n) for s, g in sites.items() for n in g):
            weight, bias = linear_weight(linears[n]).detach().float(), getattr(linears[n], "bias", None)
            rule = weight_rules[n]
            soft[n] = SoftLinear(weight, bias, _format(rule.weight_formats), inputs[s], rule.weight_blocks)
        return inputs, soft

    def loss(soft: Linears) -> float:
        with placed(runner.model, soft):
            return sum(float(steps.loss(step)) for step in steps)

    as_they_are, plain = made(learned=False)
    inputs, soft = made(learned=True)
    _static_scales(
        runner, name, {s: linears[s] for s in sites if rules[s].granularity == "per_tensor"}, (as_they_are, inputs), recipe
    )
    before = loss(plain)
    if any(rules[s].input_blocks for s in sites):  # blocks keep an outlier to themselves, which a rotation may spread
        worse = loss(soft) > before
        for site in inputs.values():
            site.forget()
            if worse:
                site.start_as_it_is()
    with no_parameter_gradients(steps.block), placed(runner.model, soft), torch.enable_grad():
        after = _descend(steps, inputs, soft, recipe, generator, tell)
    before, after = ranks.leaders(torch.tensor([before, after], dtype=torch.float64)).tolist()
    if after >= before:
        return {}
    maps = {s: site.transform() for s, site in inputs.items()}
    return {s: KroneckerTransform(ranks.leaders(m.left), ranks.leaders(m.right)) for s, m in maps.items()}


def learnable(rule: ModuleRule) -> bool:
    """Return whether a site of this rule may have a learned map."""
    return bool(rule.input_formats and rule.weight_formats) and not rule.transform


def _descend(
    steps: BlockSteps, inputs: dict[str, SoftInput], soft: Linears, recipe: Recipe, generator: torch.Generator, tell: Progress
) -> float:
    """Learn all maps and clippings together; return the loss summed over the steps of the last pass."""
    rules = recipe.transforms
    maps = [p for site in inputs.values() for p in (site.left, site.right)]
    clips = [m.clip for m in (*inputs.values(), *soft.values())]
    speeds = [{"params": maps, "lr": rules.learning_rate}, {"params": clips, "lr": _CLIP_SPEED * rules.learning_rate}]
    optimizer = torch.optim.Adam(speeds)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rules.epochs * len(steps), _COOLED * rules.learning_rate)
    total = float("inf")
    for epoch in range(rules.epochs):
        tell(STAGE, epoch, rules.epochs)
        total = 0.0
        for step in steps.shuffled(generator):
            loss = steps.loss(step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
            for site in inputs.values():
                site.forget()
    tell(STAGE, rules.epochs, rules.epochs)
    return total


def _static_scales(
    runner: BlockRunner, name: str, firsts: Linears, variants: tuple[dict[str, SoftInput], ...], recipe: Recipe
) -> None:
    """Give the sites that start with the linears ``firsts`` a static scale, by the largest magnitude of what their maps make of
    the input; none where sinks will ask for a scale per token (see ``search.sinks``)."""
    found: list[dict[str, list[Tensor]]] = [{s: [] for s in firsts} for _ in variants]
    for i in range(len(runner.batches) if firsts else 0):
        for s in firsts:
            for x in inputs_of({s: firsts[s]}, partial(runner.run, name, i)):
                for inputs, parts in zip(variants, found, strict=True):
                    parts[s].append(inputs[s].mapped(x.float()).abs().amax(-1).flatten())
    for inputs, parts in zip(variants, found, strict=True):
        for s, each in parts.items():
            absmax = torch.cat(each)
            sinks = recipe.inputs.sinks != "static" and sink_ratio(absmax) > recipe.inputs.sink_ratio
            inputs[s].top = None if sinks else absmax.amax()


def _format(candidates: tuple[FloatFormat, ...]) -> FloatFormat:
    """Return the format that stands for all candidates while maps are learned: the one with as many exponent bits as mantissa bits,
    or nearly; the search chooses among all of them afterwards."""
    return min(candidates, key=lambda f: (abs(f.exponent_bits - f.mantissa_bits - 1), f.exponent_bits))
