"""The cache of keys and values of a block: decided once its linears are, from what attention multiplies."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from llm_fp4.calibration import causal_attentions, collect_cached
from llm_fp4.nn import CACHE, CacheCodes
from llm_fp4.pipeline.attention import NO_SEAM
from llm_fp4.recipe import Recipe
from llm_fp4.search import ProductSample, search_cache

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
    plans |= {_full(name, n): {"reason": NOT_CAUSAL} for n in others if recipe.selects(_full(name, n))}
    for own in causal:
        full, module = _full(name, own), block.get_submodule(own)
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
        search = recipe.search if recipe.method.startswith("fpq") else None
        plan = search_cache(_sample(scores), _sample(outputs), formats, rules, search)
        plans[full] = plan.to_json()
        made.append((module, CacheCodes.from_plan(plan)))
    return plans or {name: {"reason": NO_SEAM}}, made


def place_caches(made: list[tuple[nn.Module, CacheCodes]]) -> None:
    """Give each attention module the scales of its cache."""
    for module, codes in made:
        module.add_module(CACHE, codes)


def _full(block: str, name: str) -> str:
    return f"{block}.{name}" if name else block


def _sample(pairs: list[Any]) -> ProductSample:
    return ProductSample([a for a, _, _ in pairs], [b for _, b, _ in pairs], [c for _, _, c in pairs])
