"""The search of cached keys and values: what it must beat, and the heads that share a key."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_fp4.numerics import fake_quantize, formats_of_width, parse
from llm_fp4.recipe import CacheRules, Recipe
from llm_fp4.search import ProductSample, search_cache
from llm_fp4.search.cache import key_groups

RULES, SEARCH = CacheRules(bits=4), Recipe().search


def samples(groups: int = 2) -> tuple[ProductSample, ProductSample]:
    """Return the products of 4 heads over keys with channels and values with tokens of very different size."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    spread = torch.exp2(4 * normal(1, 1, 16))
    scores, outputs = ProductSample([], [], []), ProductSample([], [], [])
    for _ in range(3):
        keys = (normal(4 // groups, 40, 16) * spread).repeat_interleave(groups, 0)
        values = (normal(4 // groups, 40, 16) * torch.exp2(3 * normal(1, 40, 1))).repeat_interleave(groups, 0)
        scores.first.append(normal(4, 12, 16) / spread)
        scores.second.append(keys.transpose(1, 2))
        scores.counts.append(torch.ones(1, 12, 40))
        outputs.first.append(torch.softmax(normal(4, 12, 40), -1))
        outputs.second.append(values)
        outputs.counts.append(None)
    return scores, outputs


def test_searched_scales_beat_maxima_and_one_scale_a_head() -> None:
    scores, outputs = samples()
    found = search_cache(scores, outputs, formats_of_width(4), RULES, SEARCH)
    maxima = search_cache(scores, outputs, (parse("e2m1"),), RULES, None)
    assert found.errors[0] < maxima.errors[0]
    assert found.errors[1] < maxima.errors[1]
    assert found.spec.heads == 2
    assert found.key_scale.shape == (2, 1, 16)
    assert found.value_ratio.shape == (2, 1, 1)
    best = min(_one_scale(scores, float(s)) for s in torch.logspace(-2, 3, 60))
    assert found.errors[0] < 0.5 * best


def _one_scale(scores: ProductSample, scale: float) -> float:
    wrong = energy = 0.0
    for q, k in zip(scores.first, scores.second, strict=True):
        wrong += float((q @ fake_quantize(k, torch.tensor(scale), parse("e2m1")) - q @ k).square().sum())
        energy += float((q @ k).square().sum())
    return wrong / energy


def test_the_reported_errors_are_those_of_the_codes() -> None:
    scores, outputs = samples()
    found = search_cache(scores, outputs, formats_of_width(4), RULES, SEARCH)
    wrong = energy = 0.0
    for q, k in zip(scores.first, scores.second, strict=True):
        scale = found.key_scale.repeat_interleave(2, 0).transpose(1, 2)
        rounded = fake_quantize(k, scale, found.spec.key)
        wrong += float((q @ rounded - q @ k).square().sum())
        energy += float((q @ k).square().sum())
    assert abs(found.errors[0] - wrong / energy) < 1e-4 * found.errors[0] + 1e-9
    wrong = energy = 0.0
    for p, v in zip(outputs.first, outputs.second, strict=True):
        step = v.abs().amax(-1, keepdim=True) * found.value_ratio.repeat_interleave(2, 0) / found.spec.value.max_level
        wrong += float((p @ fake_quantize(v, step, found.spec.value) - p @ v).square().sum())
        energy += float((p @ v).square().sum())
    assert abs(found.errors[1] - wrong / energy) < 1e-2 * found.errors[1]


def test_tokens_that_do_not_count_do_not_matter() -> None:
    scores, outputs = samples()
    plain = search_cache(scores, outputs, formats_of_width(4), RULES, SEARCH)
    for k, c in zip(scores.second, scores.counts, strict=True):
        k[:, :, :4] *= 1e3
        assert c is not None
        c[:, :, :4] = 0
    without = search_cache(scores, outputs, formats_of_width(4), RULES, SEARCH)
    assert without.errors[0] < 2 * plain.errors[0]
    assert without.clipped < 0.2


def test_more_bits_err_less() -> None:
    scores, outputs = samples()
    found = [search_cache(scores, outputs, formats_of_width(b), RULES, SEARCH).errors for b in (4, 6, 8)]
    assert found[0][0] > 4 * found[1][0] > 16 * found[2][0]
    assert found[0][1] > 4 * found[1][1] > 16 * found[2][1]


def test_heads_that_share_a_key_are_found() -> None:
    for groups in (1, 2, 4):
        assert key_groups(samples(groups)[0].second) == groups
