"""Looking into a model without running it: what is quantized and how, or what would be, and what stays float and why."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from llm_fp4.api.loading import is_checkpoint
from llm_fp4.api.prepare import checked_structure
from llm_fp4.checkpoint import Manifest, ModuleEntry, read_attention, read_caches, read_config, verify
from llm_fp4.errors import CheckpointError
from llm_fp4.models import FloatModel, Structure, open_model
from llm_fp4.nn import CACHE_STEP, linear_shape
from llm_fp4.numerics import FloatFormat, packed_width
from llm_fp4.pipeline import shared_heads
from llm_fp4.recipe import FLOAT_BITS, Recipe, load_recipe, matches
from llm_fp4.storage import TensorFiles


@dataclass(frozen=True)
class LayerReport:
    """One linear layer or embedding.

    Attributes:
        kind: "linear", "embedding", "experts" (several matrices in one tensor) or "other". shape: (out, in) of a linear, (rows, columns) of an embedding.
        weight: the weight's format, or the candidates of one not quantized yet; empty where it stays float.
        input: likewise of the input. site: the first of the layers that share this input, None where it stays float.
        granularity: of the input's scale, "per_tensor", "per_token" or "per_block_16_e4m3", say. input_scale: its step, the ratio
            of a per-token scale, or the scale over those of blocks.
        blocks: of the weight that share a scale, "per_block_16_e4m3", say; None where rows do.
        weight_scale: smallest and largest over the rows. shift_histogram: how many channels have shift 0, 1, ...
        error: squared output error over the squared output, of the layer's site; None where it was not measured.
        sink_ratio: the largest token of the input over the median one.
        reason: why it is float, or why its input is treated otherwise than the recipe's rule.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    weight: tuple[str, ...] = ()
    input: tuple[str, ...] = ()
    site: str | None = None
    granularity: str | None = None
    input_scale: float | None = None
    weight_scale: tuple[float, float] | None = None
    shift_histogram: list[int] | None = None
    error: float | None = None
    sink_ratio: float | None = None
    reason: str = ""
    blocks: str | None = None


@dataclass(frozen=True)
class AttentionReport:
    """The two products of one attention module.

    Attributes:
        formats: of query, key, probability and value, candidates where not quantized yet; all empty where they stay float.
        errors: squared error over the squared product of query · key' and of probability · value.
        reason: why they are float.
    """

    name: str
    formats: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    errors: tuple[float | None, float | None] = (None, None)
    reason: str = ""


@dataclass(frozen=True)
class AverageBits:
    """Mean widths of what a checkpoint holds quantized; layers and tables left in float are not counted.

    Attributes:
        weights: bits a code, over the elements of all quantized weights (codes that two modules share count for both); None: no weight is.
        inputs: bits over the elements of one token at every input site, 16 where a quantized linear reads a float input, which is a
            site of its own; None: there is no quantized linear.
        stored: bits an element of the packed weights with their scales, as they lie on disk.
    """

    weights: float | None = None
    inputs: float | None = None
    stored: float | None = None


@dataclass(frozen=True)
class CacheReport:
    """How the keys and values of one attention are kept; empty formats where they stay float, with the reason.

    Attributes:
        formats: of keys and of values, candidates where nothing was decided yet. window, sinks: the newest and the first tokens,
            which stay in float. errors: of scores and outputs, squared over the squared norm. ratio: bytes in float16 over bytes here.
    """

    name: str
    formats: tuple[tuple[str, ...], tuple[str, ...]]
    window: int | None = None
    sinks: int | None = None
    errors: tuple[float | None, float | None] = (None, None)
    ratio: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Inspection:
    """What a model holds.

    Attributes:
        quantized: whether it is a checkpoint of ours; else the layers say what ``recipe`` would do.
        bytes: size of the tensors on disk, or of the parameters in their stored type for a float model.
        float_bytes: of the float model a checkpoint was made from.
        attention: its attention modules, where their products are quantized or were to be.
        fingerprint: what a checkpoint was made from: source, recipe and data by digest, and versions; None in older ones.
        average: mean widths of a checkpoint.
        budget: where widths were chosen for one: what they take, what they predict and why, as in plan.json.
        cache: its attention modules, where their keys and values are kept in codes or were to be.
    """

    origin: str
    quantized: bool
    architecture: str
    recipe: str
    method: str
    bits: str
    bytes: int
    float_bytes: int | None
    layers: list[LayerReport] = field(default_factory=list)
    attention: list[AttentionReport] = field(default_factory=list)
    fingerprint: dict[str, Any] | None = None
    cache: list[CacheReport] = field(default_factory=list)
    average: AverageBits = AverageBits()
    budget: dict[str, Any] | None = None


def inspect_model(source_or_dir: str | Path | FloatModel, recipe: Recipe | str = "fpq") -> Inspection:
    """Return what a checkpoint holds, or what ``recipe`` would make of a float model.

    Args:
        source_or_dir: a directory llm-fp4 wrote; or a float model by directory, hub name or .gguf file, or opened.
        recipe: only for a float model.
    Raises:
        CheckpointError, SourceError: it cannot be read. RecipeError: the recipe does not fit it.
        UnsupportedError: the model has nothing that can be quantized block by block.
    """
    if not isinstance(source_or_dir, FloatModel):
        if is_checkpoint(source_or_dir):
            return _checkpoint(Path(source_or_dir))
        source_or_dir = open_model(str(source_or_dir))
    return _float(source_or_dir, recipe if isinstance(recipe, Recipe) else load_recipe(recipe))


def _checkpoint(folder: Path) -> Inspection:
    manifest, config, plan = verify(folder), read_config(folder), _plan(folder)
    sites = {operand: (name, site) for name, site in plan.get("inputs", {}).items() for operand in site["operands"]}
    layers = []
    for name, entry in manifest.items():
        site_name, site = sites.get(name, (None, {}))
        weight = plan.get("weights", {}).get(name, {})
        reasons = [f"shares the codes of {entry.tied_to}"] if entry.tied_to else []
        reasons += [weight["reason"]] if weight.get("reason") else []
        layers.append(LayerReport(
            name, entry.kind, entry.shape, (entry.format.name,),
            input=(entry.input.format.name,) if entry.input else (), site=site_name,
            granularity=entry.input.granularity if entry.input else None, input_scale=site.get("scale"),
            weight_scale=(weight["scale_min"], weight["scale_max"]) if "scale_min" in weight else None,
            shift_histogram=site.get("shift_histogram"), error=weight.get("error"), sink_ratio=site.get("sink_ratio"),
            reason="; ".join(reasons + ([site["reason"]] if site.get("reason") else [])),
            blocks=entry.blocks.name if entry.blocks else None,
        ))  # fmt: skip
    files = TensorFiles(folder, CheckpointError)
    for name, shape in files.shapes.items():
        owner, _, own = name.rpartition(".")
        if own == "weight" and len(shape) == 2:  # norms have one axis
            layers.append(LayerReport(owner, "linear or embedding", (shape[0], shape[1]), reason="left in float by the recipe"))
        elif own != "weight" and len(shape) == 3:
            layers.append(LayerReport(name, "experts", shape, reason="left in float by the recipe"))
    quantization = config["quantization_config"]
    described = {k: str(quantization.get(k, "")) for k in ("recipe", "method", "bits")}
    size = sum(f.stat().st_size for f in sorted({*files.where.values()}))
    architecture = str((config.get("architectures") or ["unknown"])[0])
    return Inspection(
        str(folder), True, architecture, **described, bytes=size, float_bytes=plan.get("float_bytes"), layers=layers,
        attention=_attention(folder, plan), cache=_cache(folder, plan), fingerprint=quantization.get("fingerprint"),
        average=_average(manifest, sites), budget=plan.get("budget"),
    )  # fmt: skip


def _average(manifest: Manifest, sites: dict[str, tuple[str, Any]]) -> AverageBits:
    weights = [(entry.format.bits, math.prod(entry.shape)) for entry in manifest.values()]
    inputs = {sites.get(n, (n, None))[0]: (e.input.format.bits if e.input else FLOAT_BITS, e.shape[1])
              for n, e in manifest.items() if e.kind == "linear"}  # fmt: skip
    stored = [_stored_bytes(entry) for entry in manifest.values() if entry.tied_to is None]
    own = sum(math.prod(entry.shape) for entry in manifest.values() if entry.tied_to is None)
    return AverageBits(_mean(weights), _mean(list(inputs.values())), 8 * sum(stored) / own if own else None)


def _stored_bytes(entry: ModuleEntry) -> int:
    shapes = {n: shape for n, shape in entry.tensors().items() if n.startswith("weight_")}
    return sum(math.prod(shape) * entry.dtype(n).itemsize for n, shape in shapes.items())


def _mean(parts: list[tuple[int, int]]) -> float | None:
    total = sum(elements for _, elements in parts)
    return sum(bits * elements for bits, elements in parts) / total if total else None


def _attention(folder: Path, plan: dict[str, Any]) -> list[AttentionReport]:
    """Return the attention modules of a checkpoint, and those the plan says were left in float."""
    decided, found = plan.get("attention", {}), []
    for name, spec in read_attention(read_config(folder)["quantization_config"], str(folder)).items():
        first, second, third, fourth = ((f.name,) for f in spec.formats)
        products = decided.get(name)
        errors = (products[0]["error"], products[1]["error"]) if isinstance(products, list) else (None, None)
        found.append(AttentionReport(name, (first, second, third, fourth), errors))
    left = {n: p["reason"] for n, p in decided.items() if isinstance(p, dict)}
    return found + [AttentionReport(n, ((), (), (), ()), reason=reason) for n, reason in left.items()]


def _cache(folder: Path, plan: dict[str, Any]) -> list[CacheReport]:
    """Return the caches of a checkpoint, and those the plan says were left in float."""
    decided, found = plan.get("cache", {}), []
    for name, spec in read_caches(read_config(folder)["quantization_config"], str(folder)).items():
        entry = decided.get(name, {})
        errors = (entry.get("score_error"), entry.get("output_error"))
        codes = packed_width(spec.key_size, spec.key.bits) + packed_width(spec.value_size, spec.value.bits) + CACHE_STEP.itemsize
        ratio = 2 * (spec.key_size + spec.value_size) / codes
        formats = ((spec.key.name,), (spec.value.name,))
        found.append(CacheReport(name, formats, spec.window, spec.sinks, errors, ratio))
    return found + [CacheReport(n, ((), ()), reason=p["reason"]) for n, p in decided.items() if "reason" in p]


def _plan(folder: Path) -> dict[str, Any]:
    """Return plan.json; nothing runs on it, so a checkpoint without one is still described by its manifest."""
    path = folder / "plan.json"
    if not path.is_file():
        return {}
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); remove it to see what config.json says, or quantize again") from None
    if not isinstance(plan, dict):
        raise CheckpointError(f"{path} does not hold a plan; remove it to see what config.json says, or quantize again")
    return plan


def _float(opened: FloatModel, recipe: Recipe) -> Inspection:
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
