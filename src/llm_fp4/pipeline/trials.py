"""Parts of the model rounded on trial: the error of every width, and how to let the model run with one of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from llm_fp4.kernels import hadamard
from llm_fp4.nn import linear_weight
from llm_fp4.numerics import require_finite
from llm_fp4.pipeline.disturbing import inputs_as, weights_as
from llm_fp4.pipeline.sites import Linears
from llm_fp4.recipe import FLOAT_BITS, Recipe
from llm_fp4.search import quick_input, quick_table, quick_weight
from llm_fp4.statistics import Gram, SiteStatistics

Trial = Callable[[], AbstractContextManager[None]]
"""Lets the model run with one part rounded while the context it opens lasts."""


@dataclass
class Sensitivity:
    """One weight or one input.

    Attributes:
        kind, name, elements, site: as of :class:`~llm_fp4.search.Part`.
        errors: by width, squared error of the outputs of what reads it (of its rows, for an embedding).
        losses: by width, divergence in nats a prediction. measured: the widths at which it was measured.
    """

    kind: str
    name: str
    elements: int
    site: str | None = None
    errors: dict[int, float] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    measured: list[int] = field(default_factory=list)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Sensitivity:
        """Return what the run's state holds; JSON made words of the widths."""
        by_width = {key: {int(b): v for b, v in data[key].items()} for key in ("errors", "losses")}
        return cls(**{**data, **by_width})


@dataclass
class Site:
    """Linears that read one tensor, by name; ``head``: they lie outside the blocks."""

    operands: Linears
    head: bool = False

    @property
    def name(self) -> str:
        """The first of the operands, after which the site is called."""
        return next(iter(self.operands))


class Candidate:
    """A part at all its widths.

    Args:
        make: returns the trial of a width and its error; ``light``: trials of all widths are kept, else only the narrowest.
    Attributes:
        outside: it lies outside the blocks, so that it holds in every one of them.
    """

    def __init__(self, found: Sensitivity, make: Callable[[int], tuple[Trial, float]], *, light: bool, outside: bool) -> None:
        self.found, self.outside, self._make = found, outside, make
        self._ready: dict[int, Trial] = {}
        for bits in found.losses:
            if bits == FLOAT_BITS:
                found.errors[bits] = 0.0
                continue
            trial, found.errors[bits] = make(bits)
            if light or bits == min(found.losses):
                self._ready[bits] = trial

    def at(self, bits: int) -> Trial:
        """Return the trial of a width, made again where it was not kept."""
        return self._ready.pop(bits, None) or self._make(bits)[0]


def site_candidates(
    site: Site, parts: list[Sensitivity], statistics: SiteStatistics, recipe: Recipe, turned: bool
) -> list[Candidate]:
    """Return the weights and the input of a site.

    Args:
        turned: the input passes a Hadamard transform, as the rows in ``statistics`` did.
    """
    budget = recipe.budget
    assert budget is not None
    weights = {n: linear_weight(m).float() for n, m in site.operands.items()}
    for n, w in weights.items():
        require_finite(w, f"the weight of {n}")
    weights = {n: hadamard(w) for n, w in weights.items()} if turned else weights
    gram = Gram(statistics.gram, None, None)
    # the recipe under which a part has a width
    rules = {(w, a): recipe.at(w, a) for w, a in budget.pairs}

    def weight(name: str, bits: int) -> tuple[Trial, float]:
        rule = next(r for r in (p.rule(name, head=site.head) for p in rules.values()) if r.weight_formats[0].bits == bits)
        values, error = quick_weight(weights[name], gram, rule, recipe)
        return partial(weights_as, {site.operands[name]: hadamard(values) if turned else values}), error

    def read(name: str, bits: int) -> tuple[Trial, float]:
        found = (p.rule(name, head=site.head) for p in rules.values())
        rule = next(r for r in found if r.input_formats and r.input_formats[0].bits == bits)
        rounding, error = quick_input(weights, statistics, rule, recipe)

        def rounded(x: Tensor) -> Tensor:
            rows = x.float()
            return hadamard(rounding(hadamard(rows))) if turned else rounding(rows)  # the transform is its own inverse

        return partial(inputs_as, list(site.operands.values()), rounded), error

    return [
        Candidate(p, partial(weight if p.kind == "weight" else read, p.name), light=p.kind == "input", outside=site.head)
        for p in parts
    ]


def table_candidate(found: Sensitivity, tables: dict[str, list[nn.Module]], recipe: Recipe) -> Candidate:
    """Return all token embeddings, which have one width; ``tables``: by name, the modules that hold the table."""
    assert recipe.budget is not None
    recipes = {r.embedding_formats()[0].bits: r for r in (recipe.at(w, a) for w, a in recipe.budget.pairs)}

    def make(bits: int) -> tuple[Trial, float]:
        values: dict[nn.Module, Tensor] = {}
        error = 0.0
        for name, modules in tables.items():
            weight = linear_weight(modules[0]).float()
            require_finite(weight, f"the weight of {name}")
            rounded, lost = quick_table(weight, recipes[bits])
            values |= dict.fromkeys(modules, rounded)
            error += lost
        return partial(weights_as, values), error

    return Candidate(found, make, light=False, outside=True)
