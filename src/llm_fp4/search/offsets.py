"""Whether an input is better quantized after something was subtracted from each channel, and whether unsigned.

``W x = W (x - z) + W z``: the second part is a constant, which the operands' biases hold. Subtracting the channels' means
narrows an input whose channels lie off zero. An input with hardly anything below zero (what GELU gives: -0.17 to 40, say)
becomes non-negative by subtracting its minimum; an unsigned format then spends the sign bit on exponent or mantissa.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_fp4.numerics import FloatFormat, fake_quantize, scale_of_max
from llm_fp4.plan import SiteResult
from llm_fp4.recipe import InputRules, ModuleRule
from llm_fp4.search.blocks import choose_block_input, maximum_blocks
from llm_fp4.search.grids import Grid
from llm_fp4.search.inputs import InputChoice, OutputError, choose_input, maximum_choices
from llm_fp4.statistics import SiteStatistics

SKEW = 4.0  # an input is nearly non-negative where its largest value exceeds its smallest so many times,
CHANNEL_SKEW = 2.0  # and, lest a single token decide that, 99 % quantiles of half of the channels their 1 % quantiles
_TOKENS = 1024  # evenly spaced, for the quantiles
GAIN = 0.05  # of the output error, which a variant must save: less is lost again on other data


@dataclass(frozen=True)
class Variant:
    """One way to treat an input.

    Attributes:
        offset: (in,) float32 that is subtracted, or None. formats: candidates. words: for the plan.
    """

    offset: Tensor | None
    formats: tuple[FloatFormat, ...]
    words: str

    def shifted(self, x: Tensor) -> Tensor:
        """Return (..., in) ``x`` less the offset."""
        return x if self.offset is None else x - self.offset


def variants(statistics: SiteStatistics, rule: ModuleRule, inputs: InputRules) -> list[Variant]:
    """Return the ways that the recipe allows for an input, as it is first.

    Whether it is nearly non-negative is seen by its values, not by the name of the layer before it.
    """
    found = [Variant(None, rule.input_formats, "")]
    unsigned = rule.unsigned_formats if rule.input_blocks is None else ()  # block formats are signed
    if inputs.offset == "none" and not unsigned:
        return found
    low, high, mean = statistics.channel_ranges
    if inputs.offset == "mean":
        found.append(Variant(mean, rule.input_formats, "the mean of each channel is subtracted"))
    least, most = float(low.amin()), float(high.amax())
    if unsigned and most > 0 and -least * SKEW <= most and _mostly_above_zero(statistics):
        if least >= 0:
            found.append(Variant(None, unsigned, "unsigned, for it is never negative"))
        else:
            one = torch.full_like(low, least)
            found.append(Variant(one, unsigned, f"unsigned, after its minimum {least:.3g} is subtracted"))
            found.append(Variant(low, unsigned, "unsigned, after the minimum of each channel is subtracted"))
    return found


def _mostly_above_zero(statistics: SiteStatistics) -> bool:
    """Return whether at least half of the channels reach far further up than down, their rarest values left out."""
    rows = statistics.tokens.rows
    few = rows[:: max(1, -(-len(rows) // _TOKENS))]
    low, high = torch.quantile(few, torch.tensor([0.01, 0.99]), dim=0)
    return float((-low * CHANNEL_SKEW <= high).float().mean()) >= 0.5


def choose_variant(
    found: list[Variant], weights: dict[str, Tensor], statistics: SiteStatistics, rules: dict[str, ModuleRule], grid: Grid,
    sample_tokens: int, *, per_token: bool,
) -> tuple[Variant, str]:  # fmt: skip
    """Return the variant with the least output error on a sample, weights rounded to nearest, and the reason for the plan.

    Args:
        weights: (out, in) float32 of every operand. grid: of the input's scale.
    """
    if len(found) == 1:
        return found[0], ""
    rows, row_weight = statistics.sample(sample_tokens)
    low, high, _ = statistics.channel_ranges
    counts = [statistics.outputs(n) for n in weights]
    rounded = [_nearest(w, rules[n]) for n, w in weights.items()]
    rule, losses = next(iter(rules.values())), []
    for variant in found:
        exact = OutputError(variant.shifted(rows), row_weight, list(weights.values()), counts, centered=statistics.centered)
        absmax = torch.maximum(variant.shifted(high).abs(), variant.shifted(low).abs())
        error, own = exact.under(rounded), rule.model_copy(update={"input_formats": variant.formats})
        if rule.input_blocks is None:
            choice = choose_input(error, maximum_choices(absmax, own, per_token=per_token), grid)[0]
        else:
            choice = choose_block_input(error, absmax.amax(), own)
        losses.append(choice.loss)
    best = min(range(len(found)), key=losses.__getitem__)
    if losses[best] > (1 - GAIN) * losses[0]:
        return found[0], ""
    saved = 1 - losses[best] / max(losses[0], 1e-30)
    return found[best], f"{found[best].words}: {saved:.0%} less output error"


def folded_biases(
    weights: dict[str, Tensor], statistics: SiteStatistics, result: SiteResult, offset: Tensor | None, correct: bool
) -> dict[str, Tensor]:
    """Return what each operand's bias gains: ``W z`` of the input's offset z, and its mean output error where ``correct``.

    Args:
        statistics: of the input after the offset was subtracted, with what was wanted of it. result: with its rounded values.
    """
    if not correct and offset is None:
        return {}
    out = {}
    plan = result.input
    choice = None if plan is None else InputChoice(plan.spec, plan.scale, plan.shift, 0.0)
    exact, rounded = statistics.means(choice.quantize if choice else None) if correct else (None, None)
    for n, w in weights.items():
        gained = torch.zeros(len(w), dtype=torch.float64, device=w.device)
        if offset is not None:
            gained += w.double() @ offset.double()
        if exact is not None and rounded is not None:
            chosen, stored = result.weights[n], result.rounded.get(n)
            if stored is None:
                stored = fake_quantize(w, chosen.step(w.shape[1]).to(w.device), chosen.format)
            gained += w.double() @ exact - stored.double() @ rounded
        out[n] = gained.float()
    return out


def _nearest(weight: Tensor, rule: ModuleRule) -> Tensor:
    """Return ``weight`` rounded under the largest magnitude of each row or block, by the format that errs least."""
    if rule.weight_blocks is None:
        absmax = weight.abs().amax(1)
        tried = [fake_quantize(weight, scale_of_max(absmax, f).unsqueeze(1), f) for f in rule.weight_formats]
    else:
        plans = [maximum_blocks("", weight, f, rule.weight_blocks) for f in rule.weight_formats]
        tried = [fake_quantize(weight, p.step(weight.shape[1]), p.format) for p in plans]
    return min(tried, key=lambda q: float((weight - q).square().sum()))
