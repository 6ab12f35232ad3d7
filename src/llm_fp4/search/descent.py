"""FPQ: coordinate descent over formats and scales of one input site and its weights.

Source: LLM-FP4, arXiv:2310.16836, Eq. 10-12 and 20-23; the losses are those of the layer's output, taken from Gram
matrices (weights) and a token sample (inputs) instead of a forward pass for every candidate.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from llm_fp4.numerics import FloatFormat
from llm_fp4.plan import FixedWeight, InputPlan, InputSpec, SiteResult, WeightPlan
from llm_fp4.recipe import ModuleRule, SearchRules
from llm_fp4.search.grids import Grid, Log2Grid, PaperGrid
from llm_fp4.search.inputs import InputChoice, OutputError, choose_input, maximum_choices
from llm_fp4.search.weights import WeightChoice, choose_weight, few_tokens, site_energy, site_losses, total
from llm_fp4.statistics import Gram, SiteStatistics


def grids(rules: SearchRules) -> tuple[Grid, Grid]:
    """Return the grids of weights and of inputs; inputs may clip far below their maximum, weights hardly do."""
    if rules.grid == "paper":
        paper = PaperGrid(rules.candidates, *rules.gamma)
        return paper, paper
    return Log2Grid(lowest=-1.25), Log2Grid(lowest=-4.0, coarse=0.5, highest=0.5)


def descend(
    name: str, weights: dict[str, Tensor], statistics: SiteStatistics, rules: dict[str, ModuleRule], search: SearchRules,
    *, per_token: bool, fixed: dict[str, FixedWeight] | None = None,
) -> SiteResult:  # fmt: skip
    """Return the plan of one site: every operand's format and scales, and the input's.

    Args:
        weights: (out, in) float32 of each operand. rules: of each operand; the input's part is the same in all.
        fixed: operands whose format and scale are already decided (a tied embedding).
    """
    weight_grid, input_grid = grids(search)
    rule = next(iter(rules.values()))
    fixed = fixed or {}
    counts = {n: statistics.outputs(n) for n in weights}
    energy = {n: site_energy(w, statistics, counts[n]) for n, w in weights.items()}
    total_energy = max(sum(energy.values()), 1e-30)

    few = few_tokens(statistics)
    choice: InputChoice | None = None
    starts = maximum_choices(statistics.channel_absmax, rule, per_token=per_token)
    if starts:
        # before any weight is rounded the best input format is the one that hurts the float outputs least
        sample, operands = statistics.sample(search.sample_tokens), list(weights.values())
        error = OutputError(*sample, operands, list(counts.values()), centered=statistics.centered)
        choice, _ = choose_input(error, starts, _fixed_scale())
    best: tuple[float, InputChoice | None, dict[str, WeightChoice], dict[str, float]] | None = None
    chosen: dict[str, WeightChoice] = {}
    weight_scales: dict[str, dict[FloatFormat, Tensor]] = {}
    input_scales: dict[InputSpec, Tensor] | None = None
    gram: Gram | None = None
    for _round in range(search.rounds if starts else 1):
        del gram  # before there is the next: at wide sites these matrices are what memory goes into
        gram = statistics.quantized_gram(choice.quantize if choice else None, choice.unit if choice else None)
        if best is not None:  # the last round's input, confirmed on all tokens with the weights it was chosen for
            best = _better(best, (*_score(statistics, choice, None if few else gram, weights, chosen), choice, chosen))
        chosen = {}
        for n, w in weights.items():
            if n in fixed:
                chosen[n] = _Fixed(fixed[n])
            else:
                formats, current = rules[n].weight_formats, weight_scales.get(n)
                chosen[n], weight_scales[n] = choose_weight(w, gram, formats, weight_grid, current, counts=counts[n])
        best = _better(best, (*_score(statistics, choice, None if few else gram, weights, chosen), choice, chosen))
        if starts:
            rounded = error.under([chosen[n].values(w) for n, w in weights.items()])
            choice, input_scales = choose_input(rounded, starts, input_grid, input_scales)
            del rounded
    assert best is not None
    if starts:
        del gram
        gram = None if few else statistics.quantized_gram(choice.quantize if choice else None, choice.unit if choice else None)
        best = _better(best, (*_score(statistics, choice, gram, weights, chosen), choice, chosen))
    loss, choice, chosen, losses = best
    plans = {
        n: fixed[n].plan if n in fixed else WeightPlan(n, c.format, c.scale, losses[n] / max(energy[n], 1e-30))
        for n, c in chosen.items()
    }
    if choice is None:
        return SiteResult(None, plans)
    plan = InputPlan(name, list(weights), choice.spec, choice.scale, choice.shift, error=loss / total_energy)
    return SiteResult(plan, plans)


_Scored = tuple[float, InputChoice | None, dict[str, WeightChoice], dict[str, float]]


def _better(old: _Scored | None, new: tuple[float, dict[str, float], InputChoice | None, dict[str, WeightChoice]]) -> _Scored:
    loss, losses, choice, chosen = new
    return (loss, choice, chosen, losses) if old is None or loss < old[0] else old


def _score(
    statistics: SiteStatistics,
    choice: InputChoice | None,
    gram: Gram | None,
    weights: dict[str, Tensor],
    chosen: dict[str, WeightChoice],
) -> tuple[float, dict[str, float]]:
    """Return the squared output error over all calibration tokens, in sum and for each operand."""
    losses = {}
    for n, w in weights.items():
        lost = site_losses(w, partial(chosen[n].values, w), statistics, choice, gram)
        losses[n] = max(total(lost, statistics.outputs(n)), 0.0)
    return sum(losses.values()), losses


class _Fixed(WeightChoice):
    """A choice that is no choice: the stored values."""

    def __init__(self, fixed: FixedWeight) -> None:
        super().__init__(fixed.plan.format, fixed.plan.scale, torch.zeros(()))
        self._values = fixed.values

    def values(self, weight: Tensor, rows: slice = slice(None)) -> Tensor:
        return self._values[rows]


def _fixed_scale() -> Grid:
    """A grid of the calibrated maximum alone."""
    return Log2Grid(lowest=0.0, highest=0.0, refinements=0)
