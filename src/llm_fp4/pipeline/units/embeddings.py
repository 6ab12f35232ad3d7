"""Unit 0, the token embeddings, and how every later unit reads them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llm_fp4.models import embedding_multiplier, set_module
from llm_fp4.numerics import QuantizedTensor
from llm_fp4.pipeline.embeddings import lookups, quantize_embedding, selected_embeddings, stored_table
from llm_fp4.pipeline.tied import float_head_gram, parts
from llm_fp4.pipeline.workspace import Workspace


def embeddings_unit(work: Workspace) -> None:
    """Quantize the token embeddings that the recipe selects, and store all of them."""
    structure, recipe = work.structure, work.recipe
    work.load_outer()
    names, heads = selected_embeddings(structure, recipe), work.shared_head
    tensors: dict[str, Tensor] = {}
    plans: dict[str, Any] = {}
    for name in structure.embeddings:
        table = work.model.get_submodule(name)
        if name not in names:
            tensors |= work.tensors(table, name)
            continue
        head = next((h for h, e in heads.items() if e == name), None)
        gram = _head_gram(work, head) if head and recipe.searched else None
        quantized, plans[name] = quantize_embedding(name, table, recipe, gram)
        tensors |= {f"{name}.weight_packed": quantized.packed, f"{name}.weight_scale": quantized.scale}
        if work.keep:
            work.tables[name] = quantized
    for alias, owner in structure.aliases.items():
        if owner in plans:
            multiplier = embedding_multiplier(work.model.get_submodule(alias))
            plans[alias] = {**plans[owner], "tied_to": owner, "multiplier": multiplier}
        elif parts(structure, recipe):  # transformers will not tie them any more
            tensors[f"{alias}.weight"] = tensors[f"{owner}.weight"]
    work.store.finish(0, tensors, {"weights": plans, "inputs": {}})


def _head_gram(work: Workspace, head: str) -> Tensor:
    return float_head_gram(
        head, work.model, work.structure, work.source, work.batches, work.store.scratch, work.runs, work.device,
        work.recipe.seed, work.progress,
    )  # fmt: skip


def place_embeddings(work: Workspace) -> None:
    """Let embeddings be read from the disk where they lie there: quantized ones, unless inputs are the float model's."""
    if not work.keep or (work.sequential and work.tables):
        saved = work.store.saved(0) if not work.keep else {}
        plans = work.store.plans()[0]["weights"]

        def packed(name: str) -> QuantizedTensor | None:
            if name not in plans or not work.sequential:
                return None
            return work.tables[name] if work.keep else stored_table(plans[name], saved, name, work.shapes[name])

        for name, module in lookups(work.model, work.structure, work.source, packed, work.device).items():
            set_module(work.model, name, module)
    elif work.tables:
        work.later |= lookups(work.model, work.structure, work.source, work.tables.get, work.device)
    work.tables = {}
    work.load_outer()
