"""The cache of keys and values of a block: decided once its linears are, from what attention multiplies."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llm_fp4.calibration import causal_attentions, collect_cached
from llm_fp4.nn import CACHE, CacheCodes
from llm_fp4.pipeline.attention import NO_SEAM, full_name, product_sample
from llm_fp4.recipe import Recipe
from llm_fp4.search import search_cache

NOT_CAUSAL = "left in float: it sees every token of an encoder, whose keys and values do not grow"
NO_LAYER = "left in float: it does not keep keys and values in a cache of transformers"
NOT_WHOLE = "left in float: its cache is a sliding window or another layer's, not all keys and values"


def decide_caches(
    block: nn.Module, name: str, recipe: Recipe, run: Callable[[int], object], batches: int, whole: list[bool] | None
) -> tuple[dict[str, Any], list[tuple[nn.Module, CacheCodes]]]:
    """Return the JSON of every attention module of ``block`` by full name, and the scales of those that hold codes from now on.

    Args:
        run: runs the block on the batch of a number. whole: of each layer whether its cache keeps every token, None: all do.
    """
    formats = recipe.cache_formats()
    if not formats:
        return {}, []
    plans: dict[str, Any] = {}
    made: list[tuple[nn.Module, CacheCodes]] = []
    causal, others = causal_attentions(block, lambda: run(0))
    plans |= {full_name(name, n): {"reason": NOT_CAUSAL} for n in others if recipe.selects(full_name(name, n))}
    for own in causal:
        full, module = full_name(name, own), block.get_submodule(own)
        if not recipe.selects(full):
            continue
        layer = getattr(module, "layer_idx", None)
        reason = "" if isinstance(layer, int) else NO_LAYER
        if isinstance(layer, int) and whole is not None and layer < len(whole) and not whole[layer]:
            reason = NOT_WHOLE
        if reason:
            plans[full] = {"reason": reason}
            continue
        rules = recipe.cache
        runs = [partial(run, i) for i in range(batches)]
        scores, outputs = collect_cached(module, runs, recipe.search.sample_tokens, rules.sinks, rules.window)
        partners = rotary_partners(module, scores[0][1].shape[1])
        plan = search_cache(product_sample(scores), product_sample(outputs), formats, rules, recipe.searched, partners)
        plans[full] = plan.to_json()
        made.append((module, CacheCodes.from_plan(plan)))
    return plans or {name: {"reason": NO_SEAM}}, made


def rotary_partners(module: nn.Module, channels: int) -> Tensor | None:
    """Return the (channels,) int64 channel that rotary positions mix with each; None where the model's own file has no ``rotate_half``."""
    rotate = next((f for k in type(module).__mro__ if (f := getattr(sys.modules.get(k.__module__), "rotate_half", None))), None)
    if rotate is None or channels % 2:
        return None
    turned: Tensor = rotate(torch.arange(1.0, channels + 1))
    partners = turned.abs().long() - 1
    pairs = turned.shape == (channels,) and bool((partners[partners] == torch.arange(channels)).all())
    return partners if pairs else None


def place_caches(made: list[tuple[nn.Module, CacheCodes]]) -> None:
    """Give each attention module the scales of its cache."""
    for module, codes in made:
        module.add_module(CACHE, codes)
