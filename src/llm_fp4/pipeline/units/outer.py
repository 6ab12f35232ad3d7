"""Linears outside the blocks: those that run before a stack belong to its first block's unit, the rest to the last unit."""

from __future__ import annotations

from typing import Any

from llm_fp4.calibration import inputs_of, shared_inputs
from llm_fp4.models import set_module
from llm_fp4.pipeline.embeddings import selected_embeddings, stored_table
from llm_fp4.pipeline.sites import Decided, Linears, quantized_layers, split_sites
from llm_fp4.pipeline.units.embeddings import place_embeddings
from llm_fp4.pipeline.workspace import Workspace
from llm_fp4.plan import FixedWeight, WeightPlan
from llm_fp4.statistics import FloatRows


def bridge(work: Workspace, name: str, plans: dict[str, Any]) -> Linears:
    """Quantize the linears outside the blocks that run before the block ``name``; return the quantized ones.

    Args:
        plans: gains their JSON, and their names as "outer".
    """
    if not name.endswith(".0"):
        return {}
    selected = work.selected(work.structure.outer_linears, head=True)
    groups = shared_inputs(selected, lambda: work.runner.tail(0))  # it stops at ``name``
    ran = {n: selected[n] for group in groups for n in group}
    found: Linears = {}
    for group in split_sites(groups, ran, work.recipe, head=True):
        layers = quantized_layers(_decide(work, group, ran, plans))
        found |= layers
        for layer, module in layers.items() if work.sequential else ():
            set_module(work.model, layer, module)
    work.later |= {} if work.sequential else found
    plans["outer"] = list(found)
    return found


def tail_unit(work: Workspace, unit: int) -> None:
    """Quantize the linears after the blocks, the output head among them, and store them with all that no other unit stores."""
    structure, heads = work.structure, work.shared_head
    place_embeddings(work)
    early = {n for plan in work.store.plans() for n in plan["weights"] if n in structure.outer_linears}
    selected = work.selected([n for n in structure.outer_linears if n not in early], head=True)
    work.load_outer(everything=True)
    plans: dict[str, Any] = {"weights": {}, "inputs": {}}
    if selected:
        work.runner.check(None, lambda run: inputs_of(selected, run))
    groups = split_sites(shared_inputs(selected, lambda: work.runner.tail(0)), selected, work.recipe, head=True)
    wanted = work.floats.tail({g[0]: selected[g[0]] for g in groups}) if work.floats is not None else {}
    for group in groups:
        work.replace(_decide(work, group, selected, plans, wanted.get(group[0])))
    tensors = work.tensors(work.model, "")
    apart = (*structure.blocks, *structure.embeddings, *structure.aliases, *early)
    shared = {f"{h}.{t}" for h in heads for t in ("weight_packed", "weight_scale")}
    packed = selected_embeddings(structure, work.recipe)
    # a float head or table tied to a float embedding is that embedding's tensor
    shared |= {f"{h}.weight" for h, e in structure.tied.items() if e not in packed}
    tensors = {n: t for n, t in tensors.items() if n not in shared and not n.startswith(tuple(f"{m}." for m in apart))}
    work.store.finish(unit, tensors, plans)


def _decide(
    work: Workspace, group: list[str], selected: Linears, plans: dict[str, Any], wanted: FloatRows | None = None
) -> Decided:
    """Return the decision of one site outside the blocks; a head that shares an embedding's codes has its weight from there."""
    heads = work.shared_head
    shared = {n: heads[n] for n in group if n in heads}
    fixed = {n: _stored_embedding(work, n, embedding) for n, embedding in shared.items()}
    (site,) = work.decide([group], selected, work.runner.tail, plans, head=True, fixed=fixed, wanted=wanted)
    for n, embedding in shared.items():
        plans["weights"][n]["tied_to"] = embedding
    return site


def _stored_embedding(work: Workspace, head: str, embedding: str) -> FixedWeight:
    """Return the weight of a head that shares its embedding's codes, read back from the first unit."""
    store, shape = work.store, work.shapes[embedding]
    rows = stored_table(store.plans()[0]["weights"][embedding], store.saved(0), embedding, shape)
    return FixedWeight(WeightPlan(head, rows.format, rows.scale.to(work.device)), rows.dequantize().to(work.device))
