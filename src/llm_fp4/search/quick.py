"""Weights and inputs rounded with little effort: what a width costs, before anything is decided.

Scales come from a few candidates around the largest magnitude, without refinement, without compensation, and weights and inputs each
against the other in float.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from llm_fp4.numerics import FloatFormat, PerBlock, fake_quantize, max_scale, neighbour, second_scale
from llm_fp4.plan import WeightPlan
from llm_fp4.recipe import ModuleRule, Recipe
from llm_fp4.search.block_scales import search_scales
from llm_fp4.search.blocks import choose_block_input
from llm_fp4.search.grids import Grid, Log2Grid
from llm_fp4.search.inputs import OutputError, choose_input, maximum_choices
from llm_fp4.search.sinks import scale_per_token
from llm_fp4.search.weights import choose_weight, output_loss
from llm_fp4.statistics import Gram, SiteStatistics

Rounding = Callable[[Tensor], Tensor]
_SAMPLE = 256  # tokens that rank an input's scales
_NARROW = 4  # bits: wider formats hardly clip


def quick_weight(weight: Tensor, gram: Gram, rule: ModuleRule, recipe: Recipe) -> tuple[Tensor, float]:
    """Return (out, in) ``weight`` rounded in the best of the rule's formats, and the squared output error over all tokens."""
    formats = rule.weight_formats if recipe.method != "minmax" else rule.weight_formats[:1]
    if rule.weight_blocks is not None:
        return min((_blocks(weight, gram, rule.weight_blocks, f, recipe) for f in formats), key=lambda found: found[1])
    lowest = -0.75 if formats[0].bits <= _NARROW else -0.25
    choice, _ = choose_weight(weight, gram, formats, _grid(recipe, lowest))
    values = choice.values(weight)
    return values, output_loss(weight, values, gram)


def quick_table(weight: Tensor, recipe: Recipe) -> tuple[Tensor, float]:
    """Return (rows, in) ``weight`` of an embedding rounded row by row, and its squared error."""
    formats = recipe.embedding_formats() if recipe.method != "minmax" else recipe.embedding_formats()[:1]
    choice, _ = choose_weight(weight, None, formats, _grid(recipe, -0.75 if formats[0].bits <= _NARROW else -0.25))
    values = choice.values(weight)
    return values, float((weight - values).double().square().sum())


def quick_input(weights: dict[str, Tensor], statistics: SiteStatistics, rule: ModuleRule, recipe: Recipe) -> tuple[Rounding, float]:
    """Return the rounding of an input, a map of (n, in) rows, and the squared error of all float operands' outputs over a sample.

    Args:
        weights: (out, in) float32 of every operand.
    """
    error = OutputError(*statistics.sample(_SAMPLE), list(weights.values()))
    if rule.input_blocks is not None:
        block = choose_block_input(error, statistics.channel_absmax.amax(), rule, search=recipe.method != "minmax")
        return block.quantize, block.loss
    per_token, _ = scale_per_token(statistics, rule, recipe)
    starts = maximum_choices(statistics.channel_absmax, rule, per_token=per_token)
    starts = starts if recipe.method != "minmax" else starts[:1]
    wide = rule.input_formats[0].bits > _NARROW
    # shifts are rounded to whole octaves: a channel may clip by one of them at the scale of the largest magnitude
    grid = _grid(recipe, -0.5 if wide else -3.0, coarse=0.25 if wide else 0.5, highest=1.0)
    choice, _ = choose_input(error, starts, grid)
    return choice.quantize, choice.loss


def _grid(recipe: Recipe, lowest: float, coarse: float = 0.25, highest: float = 0.0) -> Grid:
    """Return a grid around the largest magnitude; that alone for methods without search."""
    if recipe.searched is None:
        lowest = highest = 0.0
    return Log2Grid(lowest=lowest, coarse=coarse, highest=highest, refinements=0)


def _blocks(weight: Tensor, gram: Gram, blocks: PerBlock, fmt: FloatFormat, recipe: Recipe) -> tuple[Tensor, float]:
    second = second_scale(weight.abs().amax(), fmt) if blocks.two_level else None
    scale = neighbour(max_scale(blocks.absmax(weight), second, fmt, blocks), 0, blocks)
    if recipe.method != "minmax":
        scale = search_scales(weight, gram, fmt, blocks, scale, second, joint=False)
    values = fake_quantize(weight, WeightPlan("", fmt, scale, None, blocks, second).step(weight.shape[1]), fmt)
    return values, output_loss(weight, values, gram)
