"""Block formats: the stored scale of every block of a weight by output error, and the scale over an input's blocks.

Engines scale an input's blocks when they run, so of an input only the scale over E4M3 scales is chosen. A weight's block
scale is any stored value: candidates lie around that of the largest magnitude, from clipping it to mapping it to two
thirds of the largest value (4 instead of 6 in E2M1), where the values around the top have a finer grid.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from llm_fp4.numerics import FloatFormat, PerBlock, block_step, fake_quantize, max_scale, neighbour, second_scale
from llm_fp4.plan import InputPlan, InputSpec, SiteResult, WeightPlan
from llm_fp4.recipe import ModuleRule, Recipe
from llm_fp4.search.inputs import InputChoice, OutputError
from llm_fp4.search.weights import output_loss
from llm_fp4.statistics import Gram, SiteStatistics

_ROWS = 2048  # rows searched at once: bounds the temporaries of a vocabulary-sized weight
_OFFSETS = {"e8m0": range(-1, 2)}  # octaves; for others eighths of an octave: largest value to 8.5 … 4 in E2M1
_OFFSETS |= dict.fromkeys(("e4m3", "float16"), range(-4, 6))
_SWEEPS = 2  # over the blocks of a row, where they are searched jointly
_OCTAVES = 8  # of candidates below the scale of an input's largest magnitude


def search_blocks(
    name: str, weights: dict[str, Tensor], statistics: SiteStatistics, rules: dict[str, ModuleRule], recipe: Recipe
) -> SiteResult:
    """Return the plan of a site whose weights have block scales.

    Method "minmax" takes every scale from the largest magnitude, others search. Where levels are compensated later, each
    block is searched for itself, since its effect on others will be made up for; otherwise all blocks of a row jointly.

    Args:
        weights: (out, in) float32 of every operand; all share one second scale, as engines that fuse them require.
    """
    rule = next(iter(rules.values()))
    search, joint = recipe.method != "minmax", recipe.search.compensation == "none"
    choice = choose_block_input(weights, statistics, rule, recipe.search.sample_tokens, search=search) if rule.input_formats else None
    gram = statistics.quantized_gram(choice.quantize if choice else None)
    blocks = rule.weight_blocks
    assert blocks is not None
    top = torch.stack([w.abs().amax() for w in weights.values()]).amax()
    formats = {f for r in rules.values() for f in r.weight_formats}
    second = torch.stack([second_scale(top, f) for f in formats]).amax() if blocks.two_level else None

    plans, loss, energy = {}, 0.0, 0.0
    for n, w in weights.items():
        own = max(float(((w @ statistics.gram) * w).double().sum()), 1e-30)
        best: tuple[float, WeightPlan] | None = None
        for fmt in rules[n].weight_formats if search else rules[n].weight_formats[:1]:
            scale = neighbour(max_scale(blocks.absmax(w), second, fmt, blocks), 0, blocks)
            if search:
                scale = search_scales(w, gram, fmt, blocks, scale, second, joint=joint)
            plan = WeightPlan(n, fmt, scale, None, blocks, second)
            lost = output_loss(w, fake_quantize(w, plan.step(w.shape[1]), fmt), gram)
            best = (lost, plan) if best is None or lost < best[0] else best
        assert best is not None
        plans[n] = best[1]
        plans[n].error = best[0] / own
        loss, energy = loss + best[0], energy + own
    if choice is None:
        return SiteResult(None, plans)
    return SiteResult(InputPlan(name, list(weights), choice.spec, choice.scale, error=loss / energy), plans)


def choose_block_input(
    weights: dict[str, Tensor], statistics: SiteStatistics, rule: ModuleRule, sample_tokens: int, *, search: bool
) -> InputChoice:
    """Return the format of an input with block scales, and the scale over them that harms the float outputs least."""
    blocks = rule.input_blocks
    assert blocks is not None
    stacked = torch.cat(list(weights.values()))
    error = OutputError(*statistics.sample(sample_tokens), stacked, stacked)
    best: InputChoice | None = None
    for fmt in rule.input_formats if search else rule.input_formats[:1]:
        spec, top = InputSpec(fmt, blocks.name), statistics.channel_absmax.amax()
        first = second_scale(top, fmt) if blocks.two_level else torch.ones_like(top)
        for octave in range(_OCTAVES if search and blocks.two_level else 1):
            choice = InputChoice(spec, first * 2.0**-octave, None, float("inf"))
            choice.loss = float(error(choice.quantize(error.rows)))
            best = choice if best is None or choice.loss < best.loss else best
    assert best is not None
    return best


def search_scales(
    weight: Tensor, gram: Gram, fmt: FloatFormat, blocks: PerBlock, start: Tensor, second: Tensor | None, *, joint: bool
) -> Tensor:
    """Return the stored (out, blocks) scales of least output error among the neighbours of ``start``.

    Args:
        weight: (out, in) float32. joint: count what the errors of a row's blocks do to each other and to the input's error.
    """
    size, columns = blocks.block_size, weight.shape[1]
    short = -columns % size
    qq = pad(gram.qq, (0, short, 0, short))
    crossed = weight @ gram.eq if joint and gram.eq is not None else torch.zeros_like(weight)
    out = []
    for start_row in range(0, len(weight), _ROWS):
        rows = slice(start_row, start_row + _ROWS)
        own = _Blocks(pad(weight[rows], (0, short)), qq, fmt, blocks, start[rows], second)
        offset = own.independent()
        if joint:
            offset = own.jointly(offset, pad(crossed[rows], (0, short)))
        out.append(neighbour(start[rows], offset, blocks))
    return torch.cat(out)


class _Blocks:
    """Rows of a weight cut into blocks, with the errors that each candidate scale leaves in them."""

    def __init__(self, weight: Tensor, qq: Tensor, fmt: FloatFormat, blocks: PerBlock, start: Tensor, second: Tensor | None) -> None:
        """Args: weight (rows, in), qq (in, in), both padded to whole blocks; start (rows, blocks) stored scales."""
        size = blocks.block_size
        self._size, self._qq, self._format, self._weight = size, qq, fmt, weight
        self._offsets = list(_OFFSETS[blocks.scale_dtype])
        self._steps = torch.stack([block_step(neighbour(start, o, blocks), second, fmt) for o in self._offsets])  # (c, rows, blocks)
        self._own = torch.stack([qq[i : i + size, i : i + size] for i in range(0, len(qq), size)])  # (blocks, size, size)

    def _errors(self, block: int) -> Tensor:
        """Return (candidates, rows, size) ``w - w_hat`` of one block."""
        w = self._weight[:, block * self._size : (block + 1) * self._size]
        return w - fake_quantize(w.expand(len(self._offsets), *w.shape), self._steps[:, :, block, None], self._format)

    def _offset(self, candidate: Tensor) -> Tensor:
        return torch.tensor(self._offsets, device=candidate.device)[candidate]

    def independent(self) -> Tensor:
        """Return the (rows, blocks) candidate offsets of least error, each block for itself."""
        best = []
        for b, own in enumerate(self._own):
            d = self._errors(b)
            best.append(((d @ own).mul_(d)).sum(-1).argmin(0))
        return self._offset(torch.stack(best, 1))

    def jointly(self, offset: Tensor, crossed: Tensor) -> Tensor:
        """Return the (rows, blocks) offsets after descent over blocks, from ``offset``; ``crossed`` (rows, in) is ``W eq``."""
        candidate = offset - self._offsets[0]
        count = range(len(self._own))
        row = torch.arange(len(offset), device=offset.device)
        d = torch.cat([self._errors(b)[candidate[:, b], row] for b in count], 1)  # (rows, in)
        inner = (d @ self._qq).add_(crossed)
        for _ in range(_SWEEPS):
            for b in count:
                here, own = slice(b * self._size, (b + 1) * self._size), self._own[b]
                trial = self._errors(b)
                others = inner[:, here] - d[:, here] @ own
                candidate[:, b] = ((trial @ own).add_(others, alpha=2.0).mul_(trial)).sum(-1).argmin(0)
                new = trial[candidate[:, b], row]
                inner.addmm_(new - d[:, here], self._qq[here])
                d[:, here] = new
        return self._offset(candidate)
