"""Block formats: the plan of a site whose weights and input have a scale for every few values.

Engines scale an input's blocks when they run, so of an input only the scale over E4M3 scales is chosen. A weight's block
scale is any stored value.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llm_fp4.numerics import FloatFormat, PerBlock, fake_quantize, max_scale, neighbour, second_scale
from llm_fp4.plan import InputPlan, InputSpec, SiteResult, WeightPlan
from llm_fp4.recipe import ModuleRule, Recipe
from llm_fp4.search.block_compensation import BlockGrid, compensate_blocks
from llm_fp4.search.block_scales import search_scales
from llm_fp4.search.inputs import InputChoice, OutputError
from llm_fp4.search.weights import output_energy, output_loss
from llm_fp4.statistics import FloatRows, SiteStatistics

_OCTAVES = 8  # of candidates below the scale of an input's largest magnitude


def search_blocks(
    name: str, weights: dict[str, Tensor], statistics: SiteStatistics, rules: dict[str, ModuleRule], recipe: Recipe,
    wanted: FloatRows | None = None,
) -> SiteResult:  # fmt: skip
    """Return the plan of a site whose weights have block scales.

    Method "minmax" takes every scale from the largest magnitude, others search it, for all blocks of a row jointly; error
    compensation then searches levels and scales again.

    Args:
        weights: (out, in) float32 of every operand; all share one second scale, as engines that fuse them require.
        wanted: the float model's rows, for the error compensation.
    """
    rule = next(iter(rules.values()))
    search = recipe.method != "minmax"
    choice: InputChoice | None = None
    if rule.input_formats:
        sample, counts = statistics.sample(recipe.search.sample_tokens), [statistics.outputs(n) for n in weights]
        error = OutputError(*sample, list(weights.values()), counts, centered=statistics.centered)
        choice = choose_block_input(error, statistics.channel_absmax.amax(), rule, search=search)
    gram = statistics.quantized_gram(choice.quantize if choice else None)
    compensated = gram
    if wanted is not None:
        compensated = replace(statistics, wanted=wanted).quantized_gram(choice.quantize if choice else None)
    blocks = rule.weight_blocks
    assert blocks is not None
    top = torch.stack([w.abs().amax() for w in weights.values()]).amax()
    formats = {f for r in rules.values() for f in r.weight_formats}
    second = torch.stack([second_scale(top, f) for f in formats]).amax() if blocks.two_level else None

    result, loss, energy = SiteResult(None, {}), 0.0, 0.0
    for n, w in weights.items():
        count = statistics.outputs(n)
        own = max(output_energy(w, statistics.gram, count), 1e-30)
        best: tuple[float, WeightPlan] | None = None
        for fmt in rules[n].weight_formats if search else rules[n].weight_formats[:1]:
            plan = maximum_blocks(n, w, fmt, blocks, second)
            if search:
                plan.scale = search_scales(w, gram, fmt, blocks, plan.scale, second, joint=True)
            lost = output_loss(w, fake_quantize(w, plan.step(w.shape[1]), fmt), gram, count)
            best = (lost, plan) if best is None or lost < best[0] else best
        assert best is not None
        lost, plan = best
        if search and recipe.search.compensation != "none":
            values, scale = compensate_blocks(w, compensated, BlockGrid(plan.format, blocks, second), recipe.search)
            nearest = fake_quantize(w, plan.step(w.shape[1]), plan.format)
            before = lost if compensated is gram else output_loss(w, nearest, compensated, count)
            if (again := output_loss(w, values, compensated, count)) < before:
                lost, plan.scale, result.rounded[n] = lost * again / max(before, 1e-30), scale, values
        result.weights[n], plan.error = plan, lost / own
        loss, energy = loss + lost, energy + own
    if choice is not None:
        result.input = InputPlan(name, list(weights), choice.spec, choice.scale, error=loss / energy)
    return result


def maximum_blocks(name: str, weight: Tensor, fmt: FloatFormat, blocks: PerBlock, second: Tensor | None = None) -> WeightPlan:
    """Return the plan in which every block's largest magnitude is the largest value.

    Args:
        weight: (out, in) float32. second: () float32 over two-level scales; None: by the weight's largest magnitude.
    """
    if second is None and blocks.two_level:
        second = second_scale(weight.abs().amax(), fmt)
    return WeightPlan(name, fmt, neighbour(max_scale(blocks.absmax(weight), second, fmt, blocks), 0, blocks), None, blocks, second)


def choose_block_input(error: OutputError, top: Tensor, rule: ModuleRule, *, search: bool = True) -> InputChoice:
    """Return the format of an input with block scales, and the scale over them that harms the outputs least.

    Args:
        top: () the largest magnitude of the input.
    """
    blocks = rule.input_blocks
    assert blocks is not None
    best: InputChoice | None = None
    for fmt in rule.input_formats if search else rule.input_formats[:1]:
        spec = InputSpec(fmt, blocks.name)
        first = second_scale(top, fmt) if blocks.two_level else torch.ones_like(top)
        for octave in range(_OCTAVES if search and blocks.two_level else 1):
            choice = InputChoice(spec, first * 2.0**-octave, None, float("inf"))
            choice.loss = float(error(choice.quantize))
            best = choice if best is None or choice.loss < best.loss else best
    assert best is not None
    return best
