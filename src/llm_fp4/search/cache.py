"""Formats and scales of cached keys and values, by the error of attention's two products.

Dividing keys by the steps of their channels and multiplying queries by them leaves query · key' as it is, and so does dividing
values by their tokens' magnitudes: what is left to search is one factor a head, as for any product.
Source: KIVI, arXiv:2402.02750 (keys by channel, values by token); the search is LLM-FP4's, arXiv:2310.16836, Eq. 10-12.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from llm_fp4.numerics import FloatFormat, fake_quantize, scale_of_max
from llm_fp4.plan import CachePlan, CacheSpec
from llm_fp4.recipe import CacheRules, SearchRules
from llm_fp4.search.descent import grids
from llm_fp4.search.grids import Best, Log2Grid
from llm_fp4.search.products import ProductError, ProductSample

_FACTORS = Log2Grid(lowest=-0.5, coarse=0.125, highest=0.25, refinements=1)  # around what each channel found for itself


def search_cache(
    scores: ProductSample, outputs: ProductSample, formats: Sequence[FloatFormat], rules: CacheRules, search: SearchRules | None
) -> CachePlan:
    """Return the formats and scales under which scores and outputs err least.

    Args:
        scores: query (heads, rows, channels) and key' (heads, channels, tokens), the key repeated for the queries that share it.
        outputs: probability (heads, rows, tokens) and value (heads, tokens, channels), likewise.
        search: None takes the first format and the largest magnitudes.
    """
    groups = key_groups(scores.second)
    keys = [k[::groups].transpose(1, 2) for k in scores.second]  # (key heads, tokens, channels)
    visible = [_visible(k, c) for k, c in zip(keys, scores.counts, strict=True)]
    candidates = formats if search is not None else formats[:1]
    best_key = min((_key(keys, visible, scores, f, search, groups) for f in candidates), key=lambda found: found[2])
    best_value = min((_value(outputs, f, search, groups) for f in candidates), key=lambda found: found[2])
    (key, key_scale, key_error), (value, ratio, value_error) = best_key, best_value
    spec = CacheSpec(key, value, len(keys[0]), keys[0].shape[-1], outputs.second[0].shape[-1], rules.window, rules.sinks)
    wide = [(k.abs() > key_scale * key.max_level) & v for k, v in zip(keys, visible, strict=True)]
    seen = sum(int(v.sum()) * k.shape[-1] for k, v in zip(keys, visible, strict=True))
    return CachePlan(spec, key_scale, ratio, (key_error, value_error), sum(int(w.sum()) for w in wide) / max(seen, 1))


def key_groups(keys: Sequence[Tensor]) -> int:
    """Return how many neighbouring heads of every (heads, ...) tensor hold the same key (grouped-query attention)."""
    heads = len(keys[0])
    for size in range(heads, 1, -1):
        if heads % size == 0 and all(torch.equal(k, k[::size].repeat_interleave(size, 0)) for k in keys):
            return size
    return 1


def _visible(keys: Tensor, counts: Tensor | None) -> Tensor:
    """Return (1, tokens, 1) bool: the tokens that some query of the sample sees."""
    if counts is None:
        return torch.ones(1, keys.shape[1], 1, dtype=torch.bool, device=keys.device)
    return (counts > 0).any(0).any(0).view(1, -1, 1)


def _key(
    keys: list[Tensor], visible: list[Tensor], scores: ProductSample, fmt: FloatFormat, search: SearchRules | None, groups: int
) -> tuple[FloatFormat, Tensor, float]:
    """Return the format, the (key heads, 1, channels) steps and the relative error of the scores."""
    step = scale_of_max(torch.stack([(k * v).abs().amax(1, keepdim=True) for k, v in zip(keys, visible, strict=True)]).amax(0), fmt)
    if search is not None:

        def channel_error(scale: Tensor) -> Tensor:
            wrong = [
                (fake_quantize(k, scale, fmt) - k).square_().mul_(v).sum(1, keepdim=True)
                for k, v in zip(keys, visible, strict=True)
            ]
            return torch.stack(wrong).sum(0)

        _, grid = grids(search)
        best = grid.sweep(channel_error, step, fmt)
        grid.refine(best, False)
        step = best.scale
    wide = step.repeat_interleave(groups, 0)
    unit = ProductSample([q * wide for q in scores.first], [k / wide.transpose(1, 2) for k in scores.second], scores.counts)
    factor, error = _factor(ProductError(unit, True), fmt, torch.ones(len(wide), 1, 1, device=step.device), search, groups)
    return fmt, (step * factor).float(), error


def _value(outputs: ProductSample, fmt: FloatFormat, search: SearchRules | None, groups: int) -> tuple[FloatFormat, Tensor, float]:
    """Return the format, the (key heads, 1, 1) clipping ratios and the relative error of the outputs."""
    tops = [v.abs().amax(2, keepdim=True).clamp_(min=1e-30) for v in outputs.second]  # (heads, tokens, 1)
    unit = ProductSample(
        [p * t.transpose(1, 2) for p, t in zip(outputs.first, tops, strict=True)],
        [v / t for v, t in zip(outputs.second, tops, strict=True)], outputs.counts,
    )  # fmt: skip
    start = torch.full((len(tops[0]), 1, 1), 1.0 / fmt.max_level, device=tops[0].device)
    factor, error = _factor(ProductError(unit, True), fmt, start, search, groups)
    return fmt, (factor * fmt.max_level).float(), error


def _factor(error: ProductError, fmt: FloatFormat, start: Tensor, search: SearchRules | None, groups: int) -> tuple[Tensor, float]:
    """Return the (key heads, 1, 1) scales of the second input around (heads, 1, 1) ``start``, and the relative error they give."""

    def loss(scale: Tensor, fmt: FloatFormat) -> Tensor:
        return error(None, (fmt, scale.repeat_interleave(groups, 0))).view(-1, groups, 1).sum(1, keepdim=True).float()

    first = start[::groups]
    if search is None:
        best = Best(partial(loss, fmt=fmt), first)
    else:
        best = _FACTORS.sweep(partial(loss, fmt=fmt), first, fmt)
        _FACTORS.refine(best, False)
    return best.scale, best.total / max(error.energy, 1e-30)
