"""The report on a float model: what a recipe would make of it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from llm_fp4.api.prepare import checked_structure
from llm_fp4.api.reports import AttentionReport, CacheReport, Inspection, LayerReport
from llm_fp4.models import FloatModel, Structure
from llm_fp4.nn import linear_shape
from llm_fp4.numerics import FloatFormat
from llm_fp4.pipeline import shared_heads
from llm_fp4.recipe import Recipe, matches


def wished_report(opened: FloatModel, recipe: Recipe) -> Inspection:
    """Return what ``recipe`` would quantize of a float model and with which candidate formats, and why the rest stays float.

    Raises:
        UnsupportedError: the model has nothing that can be quantized block by block. RecipeError: the recipe does not fit it.
    """
    structure = checked_structure(opened.model, recipe, opened.source)
    shared = {**shared_heads(structure, recipe), **structure.aliases}
    layers = []
    for name in structure.names():
        shape = linear_shape(opened.model.get_submodule(name))
        kind = "embedding" if name in structure.embeddings or name in structure.aliases else "linear"
        weight, read, reason = _candidates(name, kind, structure, recipe)
        if name in shared:
            reason = f"shares the codes of {shared[name]}"
        layers.append(LayerReport(name, kind, shape, weight, read, reason=reason))
    for name, reason in structure.floats.items():
        layers.append(LayerReport(name, "other", _shape(opened.model.get_submodule(name)), reason=reason))
    for name in structure.others:  # what the recipe wanted of them was taken apart, or refused
        layers.append(LayerReport(name, "other", _shape(opened.model.get_submodule(name)), reason="left in float by the recipe"))
    return Inspection(
        opened.origin,
        False,
        type(opened.model).__name__,
        recipe.name,
        recipe.method,
        recipe.widths,
        opened.bytes_float,
        None,
        layers,
        _wished_attention(opened.model, recipe),
        cache=_wished_cache(recipe),
    )


def _wished_cache(recipe: Recipe) -> list[CacheReport]:
    """Return what the recipe wants of caches; which modules keep keys and values is only known once they run."""
    formats = tuple(f.name for f in recipe.cache_formats())
    rules = recipe.cache
    return [CacheReport("every causal attention", (formats, formats), rules.window, rules.sinks)] if formats else []


def _wished_attention(model: nn.Module, recipe: Recipe) -> list[AttentionReport]:
    """Return what the recipe wants of attention; which modules have the seam is only known once they run."""
    signed, probabilities = (tuple(f.name for f in formats) for formats in recipe.attention_formats())
    if not signed:
        return []
    if getattr(model, "_can_set_attn_implementation", lambda: False)():
        return [AttentionReport("every attention", (signed, signed, probabilities, signed))]
    return [AttentionReport("every attention", ((), (), (), ()), reason="left in float: the model has no attention interface")]


def _shape(module: nn.Module) -> tuple[int, ...]:
    """Return the shape of the module's widest parameter."""
    return max((tuple(p.shape) for p in module._parameters.values() if p is not None), key=len)


def _candidates(name: str, kind: str, structure: Structure, recipe: Recipe) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """Return the candidate formats of weight and input, and why the layer stays float where it does."""
    if pattern := next((p for p in recipe.ignore if matches(p, name)), None):
        return (), (), f"matches the ignore pattern {pattern!r}"
    if not recipe.selects(name):
        return (), (), "matches none of the targets"
    wishes = [recipe.at(w, a) for w, a in recipe.budget.pairs] if recipe.budget else [recipe]
    if kind == "embedding":
        formats = _names(f for wish in wishes for f in wish.embedding_formats())
        return formats, (), "" if formats else "the recipe leaves embeddings at 16 bits"
    rules = [wish.rule(name, head=name in structure.outer_linears) for wish in wishes]
    weight, read = _names(f for r in rules for f in r.weight_formats), _names(f for r in rules for f in r.input_formats)
    if not weight:
        return weight, read, "the recipe leaves it at 16 bits"
    return weight, read, "" if read else "input at 16 bits"


def _names(formats: Iterable[FloatFormat]) -> tuple[str, ...]:
    """Return the names of ``formats``, each once."""
    return tuple(dict.fromkeys(f.name for f in formats))
