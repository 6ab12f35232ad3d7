"""The report on a checkpoint that llm-fp4 wrote."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from llm_fp4.api.reports import AttentionReport, AverageBits, CacheReport, Inspection, LayerReport
from llm_fp4.checkpoint import Manifest, ModuleEntry, read_attention, read_caches, read_config, read_plan, verify
from llm_fp4.errors import CheckpointError
from llm_fp4.nn import CACHE_STEP
from llm_fp4.numerics import packed_width
from llm_fp4.recipe import FLOAT_BITS
from llm_fp4.storage import TensorFiles


def stored_report(folder: Path) -> Inspection:
    """Return what the checkpoint in ``folder`` holds, from its manifest, plan.json and the headers of its shards.

    Raises:
        CheckpointError: it is damaged or incomplete.
    """
    manifest, config, plan = verify(folder), read_config(folder), read_plan(folder)
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
        average=_average(manifest, sites), budget=plan.get("budget"), prefix=plan.get("prefix"),
        reconstruction=plan.get("reconstruction"),
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
