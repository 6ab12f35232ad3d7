"""Learning the maps of a block's inputs: gradient descent on the error of the block's output while everything is rounded.

Source: FlatQuant, arXiv:2410.09426, §3: a Kronecker-factored affine map for every input, learned block by block.
"""

from __future__ import annotations

import zlib
from functools import partial

import torch
from torch import Tensor, nn

from llm_fp4.calibration import inputs_of, no_parameter_gradients
from llm_fp4.models import BlockRunner, placed
from llm_fp4.nn import linear_weight
from llm_fp4.numerics import FloatFormat
from llm_fp4.pipeline.steps import BlockSteps
from llm_fp4.recipe import ModuleRule, Recipe
from llm_fp4.search import sink_ratio
from llm_fp4.transforms import KroneckerTransform, SoftInput, SoftLinear

_CLIP_SPEED = 5.0  # clipping learns so many times faster than the maps
_COOLED = 0.01  # the last step's share of the first one's length

Linears = dict[str, nn.Module]


def learn_transforms(
    runner: BlockRunner, name: str, groups: list[list[str]], linears: Linears, recipe: Recipe, steps: BlockSteps
) -> dict[str, KroneckerTransform]:
    """Return the map of each input site of a block, by the site's name; none where no map beats the channels as they are.

    Args:
        runner: has the block ``name`` next, with real float weights. groups: names of the linears that share an input.
        steps: the block's calibration data.
    """
    rules = {g[0]: recipe.rule(g[0]) for g in groups}
    sites = {s: g for s, g in zip(rules, groups, strict=True) if learnable(rules[s])}
    if not sites:
        return {}
    device = linear_weight(next(iter(linears.values()))).device
    generator = torch.Generator().manual_seed(recipe.seed ^ zlib.crc32(name.encode()))
    tops = _tops(runner, name, {s: linears[s] for s in sites}, rules, recipe)
    weight_rules = {n: recipe.rule(n) for g in sites.values() for n in g}

    def made(learned: bool) -> tuple[dict[str, SoftInput], Linears]:
        inputs = {}
        for s in sites:
            width, fmt = linear_weight(linears[s]).shape[1], _format(rules[s].input_formats)
            inputs[s] = SoftInput(width, fmt, generator, tops[s], learned, rules[s].input_blocks).to(device)
        soft: Linears = {}
        for s, n in ((s, n) for s, g in sites.items() for n in g):
            weight, bias = linear_weight(linears[n]).detach().float(), getattr(linears[n], "bias", None)
            rule = weight_rules[n]
            soft[n] = SoftLinear(weight, bias, _format(rule.weight_formats), inputs[s], rule.weight_blocks)
        return inputs, soft

    def loss(soft: Linears) -> float:
        with placed(runner.model, soft):
            return sum(float(steps.loss(step)) for step in steps)

    before = loss(made(learned=False)[1])
    inputs, soft = made(learned=True)
    if any(rules[s].input_blocks for s in sites):  # blocks keep an outlier to themselves, which a rotation may spread
        worse = loss(soft) > before
        for site in inputs.values():
            site.forget()
            if worse:
                site.start_as_it_is()
    with no_parameter_gradients(steps.block), placed(runner.model, soft), torch.enable_grad():
        after = _descend(steps, inputs, soft, recipe, generator)
    return {s: site.transform() for s, site in inputs.items()} if after < before else {}


def learnable(rule: ModuleRule) -> bool:
    """Return whether a site of this rule may have a learned map."""
    return bool(rule.input_formats and rule.weight_formats) and not rule.transform


def _descend(steps: BlockSteps, inputs: dict[str, SoftInput], soft: Linears, recipe: Recipe, generator: torch.Generator) -> float:
    """Learn all maps and clippings together; return the loss summed over the steps of the last pass."""
    rules = recipe.transforms
    maps = [p for site in inputs.values() for p in (site.left, site.right)]
    clips = [m.clip for m in (*inputs.values(), *soft.values())]
    speeds = [{"params": maps, "lr": rules.learning_rate}, {"params": clips, "lr": _CLIP_SPEED * rules.learning_rate}]
    optimizer = torch.optim.Adam(speeds)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rules.epochs * len(steps), _COOLED * rules.learning_rate)
    total = float("inf")
    for _ in range(rules.epochs):
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
    return total


def _tops(
    runner: BlockRunner, name: str, firsts: Linears, rules: dict[str, ModuleRule], recipe: Recipe
) -> dict[str, Tensor | None]:
    """Return the largest magnitude of each site's input, None where it will have no static scale (see ``search.sinks``)."""
    tokens: dict[str, list[Tensor]] = {s: [] for s in firsts if rules[s].granularity == "per_tensor"}
    for i in range(len(runner.batches)):
        for s, parts in tokens.items():
            parts += [x.abs().amax(-1).flatten() for x in inputs_of({s: firsts[s]}, partial(runner.run, name, i))]
    found: dict[str, Tensor | None] = dict.fromkeys(firsts)
    for s, parts in tokens.items():
        absmax = torch.cat(parts)
        sinks = recipe.inputs.sinks != "static" and sink_ratio(absmax) > recipe.inputs.sink_ratio
        found[s] = None if sinks else absmax.amax()
    return found


def _format(candidates: tuple[FloatFormat, ...]) -> FloatFormat:
    """Return the format that stands for all candidates while maps are learned: the one with as many exponent bits as mantissa bits,
    or nearly; the search chooses among all of them afterwards."""
    return min(candidates, key=lambda f: (abs(f.exponent_bits - f.mantissa_bits - 1), f.exponent_bits))
