"""What each weight and each input costs at every width it may have, as divergence of the model's output when it alone is rounded.

The narrowest width is measured. Where that costs little the divergence is quadratic in the error, and wider ones follow from it by the
squared error of the layer's output; where it costs much they are measured as well.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from llm_fp4.calibration import collect, shared_inputs
from llm_fp4.kernels import hadamard
from llm_fp4.models import Structure
from llm_fp4.nn import linear_shape
from llm_fp4.pipeline.disturbing import Change, FloatRun
from llm_fp4.pipeline.embeddings import selected_embeddings
from llm_fp4.pipeline.sampling import token_mask
from llm_fp4.pipeline.sites import selected_linears, split_sites
from llm_fp4.pipeline.trials import Candidate, Sensitivity, Site, site_candidates, table_candidate
from llm_fp4.progress import Progress
from llm_fp4.recipe import FLOAT_BITS, Recipe
from llm_fp4.statistics import SiteStatistics

STAGE = "sensitivity"
SMALL = 0.05  # nats: below it a divergence is taken as quadratic in the error


class Measurement:
    """Measures all parts that the recipe selects, in the order they run.

    Args:
        run: of the float model on a few batches; all parameters outside its blocks are real.
        keep, kept: write and read what is measured so far, so that an interrupted run goes on.
        folder: for the rows of a site.
    Attributes:
        sites: of every position in ``run.order`` and of the end, found by :meth:`look_around`.
        passes: work so far in forward passes over the tokens.
    """

    def __init__(
        self, run: FloatRun, structure: Structure, recipe: Recipe, folder: Path, device: torch.device,
        keep: Callable[[dict[str, Any]], None], kept: dict[str, Any] | None, progress: Progress,
    ) -> None:  # fmt: skip
        assert recipe.budget is not None
        self.run, self.structure, self.recipe, self.folder, self.device = run, structure, recipe, folder, device
        self.recipes = [recipe.at(w, a) for w, a in recipe.budget.pairs]
        self.narrow = self.recipes[0]
        self.tables = selected_embeddings(structure, self.narrow)
        self.sites: list[list[Site]] = []
        self._keep, self._progress = keep, progress
        self.found = [Sensitivity.from_json(d) for d in (kept or {}).get("found", [])]
        self._position: int = (kept or {}).get("position", 0)
        self.passes: float = (kept or {}).get("passes", 2.0)

    # --- what there is ------------------------------------------------------------------------------

    def look_around(self) -> list[Sensitivity]:
        """Run the float model once; return every part, its losses by width still 0."""
        seen: set[str] = set()

        def look(name: str | None) -> None:
            sites: list[Site] = []
            if name is None or name.endswith(".0"):  # outside: what has run so far, before a stack or at the end
                sites = self._groups(self.structure.outer_linears, lambda: self.run.runner.tail(0), True)
            sites = [s for s in sites if s.name not in seen]
            seen.update(s.name for s in sites)
            if name is not None:
                sites += self._groups(self.structure.linears[name], lambda: self.run.runner.run(name, 0), False)
            self.sites.append(sites)

        self.run.first(look)
        tables = [self._table()] if self.tables else []
        return tables + [part for sites in self.sites for site in sites for part in self._parts(site)]

    def _groups(self, names: list[str], run: Callable[[], object], head: bool) -> list[Site]:
        """Return the sites of those of ``names`` that run."""
        selected = selected_linears(self.run.model, names, self.narrow, head)
        groups = shared_inputs(selected, run)
        ran = {n: selected[n] for group in groups for n in group}
        return [Site({n: ran[n] for n in group}, head) for group in split_sites(groups, ran, self.narrow, head)]

    def _parts(self, site: Site) -> list[Sensitivity]:
        inputs = self._input_widths(site)
        reads = site.name if inputs else None
        found = []
        for n, module in site.operands.items():
            widths = sorted({r.rule(n, head=site.head).weight_formats[0].bits for r in self.recipes})
            found.append(Sensitivity("weight", n, math.prod(linear_shape(module)), reads, losses=dict.fromkeys(widths, 0.0)))
        if inputs:
            columns = linear_shape(site.operands[site.name])[1]
            found.append(Sensitivity("input", site.name, columns, losses=dict.fromkeys(inputs, 0.0)))
        return found

    def _input_widths(self, site: Site) -> list[int]:
        """Return the widths the input may have; none where it is float in any case."""
        formats = [r.rule(site.name, head=site.head).input_formats for r in self.recipes]
        widths = {f[0].bits if f else FLOAT_BITS for f in formats}
        return sorted(widths) if widths != {FLOAT_BITS} else []

    def _table(self) -> Sensitivity:
        widths = sorted({r.embedding_formats()[0].bits for r in self.recipes})
        elements = sum(cast(Tensor, self.run.model.get_submodule(n).weight).numel() for n in self.tables)
        return Sensitivity("weight", self.tables[0], elements, losses=dict.fromkeys(widths, 0.0))

    # --- what each costs ----------------------------------------------------------------------------

    def measure(self) -> list[Sensitivity]:
        """Return every part with its losses."""
        ends = len(self.run.order)
        total = ends * (ends + 1) // 2 + 1  # a block is followed to the end of the model
        for position in range(ends + 1):
            name = self.run.order[position] if position < ends else None
            if position >= self._position:
                self._progress(STAGE, total - 1 - (ends - position) * (ends - position + 1) // 2, total)
            if name is not None:
                self.run.load(name)
            if position >= self._position:
                self._measure(position)
                self._keep({"position": position + 1, "passes": self.passes, "found": [asdict(f) for f in self.found]})
            if name is not None:
                self.run.advance(name)
        self._progress(STAGE, total, total)
        return self.found

    def _measure(self, position: int) -> None:
        candidates = self._embeddings() if position == 0 and self.tables else []
        name = self.run.order[position] if position < len(self.run.order) else None
        for site in self.sites[position]:
            inside = name is not None and not site.head
            run = partial(self.run.runner.run, name) if inside and name else self.run.runner.tail
            candidates += self._candidates(site, run)
        first = [(c, min(c.found.losses)) for c in candidates]
        self._follow(position, [(c, b) for c, b in first if b != FLOAT_BITS])
        again: list[tuple[Candidate, int]] = []
        for c, narrow in first:
            for bits in sorted(c.found.losses):
                if bits in c.found.measured or bits == FLOAT_BITS:
                    continue
                if c.found.losses[narrow] > SMALL:
                    again.append((c, bits))
                else:
                    c.found.losses[bits] = c.found.losses[narrow] * c.found.errors[bits] / max(c.found.errors[narrow], 1e-30)
        self._follow(position, again)
        self.found += [c.found for c in candidates]

    def _follow(self, position: int, changes: list[tuple[Candidate, int]]) -> None:
        losses = self.run.divergences(position, [Change(c.at(b), c.outside) for c, b in changes])
        for (c, bits), loss in zip(changes, losses, strict=True):
            c.found.losses[bits] = loss
            c.found.measured.append(bits)
        blocks = len(self.run.order)
        self.passes += len(changes) * (blocks - position) / max(blocks, 1)

    def _candidates(self, site: Site, run: Callable[[int], object]) -> list[Candidate]:
        """Return the parts of a site with their errors at every width."""
        runs = [(partial(run, i), token_mask(b, self.run.runner)) for i, b in enumerate(self.run.batches)]
        turned = self.narrow.rule(site.name, head=site.head).transform
        store = collect({site.name: site.operands[site.name]}, runs, self.folder, hadamard if turned else None)[site.name]
        statistics = SiteStatistics(site.name, store, self.device, self.recipe.seed ^ zlib.crc32(site.name.encode()))
        statistics.check()
        candidates = site_candidates(site, self._parts(site), statistics, self.recipe, turned)
        store.delete()
        return candidates

    def _embeddings(self) -> list[Candidate]:
        model, aliases = self.run.model, self.structure.aliases
        tables = {n: [model.get_submodule(m) for m in (n, *(a for a, o in aliases.items() if o == n))] for n in self.tables}
        return [table_candidate(self._table(), tables, self.recipe)]
