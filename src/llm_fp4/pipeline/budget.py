"""Spending a budget: sensitivity is measured, a solver chooses the widths, and the recipe gets them as overrides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from llm_fp4.checkpoint import RunStore
from llm_fp4.models import Batch, Structure, WeightSource
from llm_fp4.pipeline.bytes import checkpoint_bytes, weight_bytes
from llm_fp4.pipeline.disturbing import FloatRun
from llm_fp4.pipeline.sampling import few
from llm_fp4.pipeline.sensitivity import Measurement
from llm_fp4.pipeline.tied import shared_heads
from llm_fp4.pipeline.trials import Sensitivity
from llm_fp4.progress import Progress
from llm_fp4.recipe import Bits, Override, Recipe
from llm_fp4.search import Chosen, Part, allocate, solver, spent

DECISION, MEASURED = "budget", "sensitivity"  # names in the run's state
_EXPLAINED = 5


def spend(
    recipe: Recipe, model: nn.Module, structure: Structure, source: WeightSource, shapes: dict[str, tuple[int, int]],
    batches: list[Batch], store: RunStore, device: torch.device, progress: Progress, load_outer: Callable[[], None],
) -> Recipe:  # fmt: skip
    """Return the recipe with a width for every part, as the run's state has it or as it is decided now.

    Args:
        load_outer: makes every parameter outside the blocks real.
    Raises:
        RecipeError: the budget cannot be met. UnsupportedError: the model gives no logits, or scipy is not installed.
    """
    assert recipe.budget is not None
    decision = store.kept(DECISION)
    if decision is None:
        solver()
        load_outer()
        run = FloatRun(model, structure, source, few(batches, recipe.budget.tokens), device)
        measurement = Measurement(
            run, structure, recipe, store.scratch, device, lambda d: store.keep(MEASURED, d), store.kept(MEASURED), progress
        )
        costs = _Costs(recipe, model, structure, source, shapes)
        empty = measurement.look_around()
        if recipe.budget.kl is None:  # what cannot be met is said before anything is measured
            costs.allocate(empty)
        found = measurement.measure()
        source.release(model, "")
        tokens = sum(b["input_ids"].numel() if "input_ids" in b else len(next(iter(b.values()))) for b in run.batches)
        decision = costs.decision(found) | {"tokens": tokens, "forward_passes": measurement.passes}
        store.keep(DECISION, decision)
    chosen = Bits.model_validate(decision["bits"])
    overrides = [Override.model_validate(o) for o in decision["overrides"]]
    return recipe.model_copy(update={"bits": chosen, "overrides": [*recipe.overrides, *overrides]})


class _Costs:
    """What the parts of a model take of a budget at every width."""

    def __init__(
        self, recipe: Recipe, model: nn.Module, structure: Structure, source: WeightSource, shapes: dict[str, tuple[int, int]]
    ) -> None:
        assert recipe.budget is not None
        self.recipe, self.budget, self.structure, self.shapes = recipe, recipe.budget, structure, shapes
        self.pairs = recipe.budget.pairs
        self.recipes = [recipe.at(w, a) for w, a in self.pairs]
        self._all = checkpoint_bytes(model, source, structure, shapes, self.recipes[0])

    def _part(self, found: Sensitivity, first_table: str | None) -> Part:
        if found.kind == "input":
            return Part("input", found.name, found.elements, found.losses)
        names = [found.name]
        if found.name in self.structure.embeddings:
            names = [n for n in self.structure.embeddings if self.recipe.selects(n)]
        stored: dict[int, int] = {}
        shares: dict[int, str] = {}
        for r in self.recipes:
            table = found.name in self.structure.embeddings
            rule = None if table else r.rule(found.name, head=found.name in self.structure.outer_linears)
            bits = (rule.weight_formats if rule else r.embedding_formats())[0].bits
            stored[bits] = sum(weight_bytes(n, self.shapes[n], self.structure, r) or 0 for n in names)
            if first_table is not None and found.name in shared_heads(self.structure, r):
                shares[bits] = first_table
        return Part("weight", found.name, found.elements, found.losses, found.site, stored, shares)

    def parts(self, found: list[Sensitivity]) -> list[Part]:
        table = next((f.name for f in found if f.name in self.structure.embeddings), None)
        return [self._part(f, table) for f in found]

    def _fixed(self, parts: list[Part]) -> int:
        """Return the bytes of what no choice changes."""
        narrowest = {p.key: min(p.losses) for p in parts}
        return self._all - int(spent(parts, narrowest)["bytes"])

    def allocate(self, found: list[Sensitivity]) -> tuple[list[Part], Chosen]:
        parts = self.parts(found)
        return parts, allocate(parts, self.pairs, self.budget.limit, self._fixed(parts))

    def decision(self, found: list[Sensitivity]) -> dict[str, Any]:
        """Return the chosen widths as JSON, with what they take and why."""
        parts, chosen = self.allocate(found)
        narrowest = {p.key: min(p.losses) for p in parts}
        takes, least = spent(parts, chosen, self._fixed(parts)), spent(parts, narrowest, self._fixed(parts))
        table = [_row(f, chosen[f.kind, f.name]) for f in found]
        table.sort(key=lambda row: (-max(row["losses"].values()), row["kind"], row["name"]))
        saved = sorted(table, key=lambda row: (-row["saved"], row["kind"], row["name"]))
        return {
            "limit": self.budget.limit, "takes": takes, "narrowest": least,
            "kept_high": [_why(row, least["kl"]) for row in saved[:_EXPLAINED] if row["saved"] > 0],
            "sensitivity": table, **self._widths(parts, chosen),
        }  # fmt: skip

    def _widths(self, parts: list[Part], chosen: Chosen) -> dict[str, Any]:
        base = self.recipes[0]
        tables = [p for p in parts if p.name in self.structure.embeddings]
        bits = base.bits.model_copy(update={"embedding": chosen[tables[0].key]}) if tables else base.bits
        overrides = []
        for p in parts:
            if p.kind == "input" or p in tables:
                continue
            rule = base.rule(p.name, head=p.name in self.structure.outer_linears)
            change: dict[str, Any] = {}
            if rule.weight_formats[0].bits != chosen[p.key]:
                change["weight_bits"] = chosen[p.key]
            if p.site is not None:
                width = chosen["input", p.site]
                narrow = rule.input_formats[0].bits if rule.input_formats else 16
                change |= {"activation_bits": width} if width != narrow else {}
            if change:
                overrides.append({"targets": [p.name], **change})
        # a name may end like a longer one, which matches its pattern too: the longer one's own override comes after
        overrides.sort(key=lambda o: len(o["targets"][0]))
        return {"bits": bits.model_dump(), "overrides": overrides}


def _row(found: Sensitivity, bits: int) -> dict[str, Any]:
    return {
        "name": found.name, "kind": found.kind, "bits": bits, "elements": found.elements, "losses": found.losses,
        "measured": found.measured, "saved": found.losses[min(found.losses)] - found.losses[bits],
    }  # fmt: skip


def _why(row: dict[str, Any], everything: float) -> dict[str, Any]:
    narrow, bits = min(row["losses"]), row["bits"]
    alone, left = row["losses"][narrow], row["losses"][bits]
    what = "input" if row["kind"] == "input" else "weight"
    reason = (
        f"{bits} bits: at {narrow} bits this {what} alone would cost {alone:.3g} nats, "
        f"{100 * alone / max(everything, 1e-30):.0f} % of all parts at their narrowest, now {left:.2g}"
    )
    return {"name": row["name"], "kind": row["kind"], "bits": bits, "why": reason}
