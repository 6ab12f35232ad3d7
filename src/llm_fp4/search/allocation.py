"""Widths of all weights and inputs under one limit: an integer program over measured sensitivities.

Every part takes one width. Divergences are taken as additive over parts: rounding errors of different tensors are nearly
independent, and the divergence is quadratic in them where it is small. The solver is HiGHS, through scipy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm_fp4.errors import RecipeError, UnsupportedError

Key = tuple[str, str]
Chosen = dict[Key, int]
_TOTAL = 1e4  # the objective's size, far above the solver's absolute tolerances
_GAP, _NODES = 1e-7, 200_000
_MEANS = {"weight": "weights", "input": "inputs"}


@dataclass(frozen=True)
class Part:
    """Something whose width is chosen.

    Attributes:
        kind: "weight" or "input". name: the module, or the first of those that read the input.
        elements: of the weight, or of one token.
        losses: by width, the divergence in nats a prediction that this part alone causes.
        site: of a weight, the name of the input it reads; None where that stays as it is.
        bytes: by width, in the checkpoint. shares: by width, the weight that stores the codes of this one too, where both have it.
    """

    kind: str
    name: str
    elements: int
    losses: dict[int, float]
    site: str | None = None
    bytes: dict[int, int] = field(default_factory=dict)
    shares: dict[int, str] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """What the part is called in a choice."""
        return self.kind, self.name


def spent(parts: Sequence[Part], chosen: Chosen, fixed_bytes: int = 0) -> dict[str, float]:
    """Return what a choice takes: mean bits of "weights" and of "inputs" elements, "bytes" in all, and the "kl" predicted."""
    out: dict[str, float] = {}
    for kind, name in _MEANS.items():
        if total := sum(p.elements for p in parts if p.kind == kind):
            out[name] = sum(p.elements * chosen[p.key] for p in parts if p.kind == kind) / total
    stored = fixed_bytes
    for p in parts:
        owner = p.shares.get(chosen[p.key])
        if owner is None or chosen[("weight", owner)] != chosen[p.key]:
            stored += p.bytes.get(chosen[p.key], 0)
    return out | {"bytes": float(stored), "kl": sum(p.losses[chosen[p.key]] for p in parts)}


def allocate(parts: Sequence[Part], pairs: Sequence[tuple[int, int]], limit: Mapping[str, float], fixed_bytes: int = 0) -> Chosen:
    """Return the width of every part: the least divergence within ``average_bits`` or ``bytes``, or the fewest bits within ``kl``.

    Args:
        pairs: (weight, activation) bits that operands and their input may have together; parts of one width are free of them.
        fixed_bytes: of the checkpoint's other tensors.
    Raises:
        RecipeError: no choice is within the limit; the message says what the smallest one takes. UnsupportedError: no scipy.
    """
    program = _Program(parts, pairs)
    ((name, most),) = limit.items()
    rows = {"average_bits": ["weights", "inputs"], "bytes": ["bytes"], "kl": ["kl"]}[name]
    rows = [r for r in rows if r in ("bytes", "kl") or any(_MEANS[p.kind] == r for p in parts)]
    goal = {"kl": 1.0} if name != "kl" else {"weights": 1.0, "inputs": 1.0}
    bounds = {r: most - (fixed_bytes if r == "bytes" else 0) for r in rows}
    chosen = program.solve(goal, bounds)
    for _ in range(4):  # the solver keeps limits to its tolerance, this to the last bit
        over = {} if chosen is None else {r: spent(parts, chosen, fixed_bytes)[r] - most for r in rows}
        if all(excess <= 1e-12 * most for excess in over.values()):
            break
        bounds = {r: bounds[r] - 2 * max(excess, 0.0) for r, excess in over.items()}
        chosen = program.solve(goal, bounds)
    if chosen is None or any(spent(parts, chosen, fixed_bytes)[r] > most * (1 + 1e-12) for r in rows):
        raise _infeasible(parts, program, name, most, rows, fixed_bytes)
    return chosen


def _infeasible(
    parts: Sequence[Part], program: _Program, name: str, most: float, rows: Sequence[str], fixed_bytes: int
) -> RecipeError:
    what = {
        "weights": "{:.4g} bits a weight on average", "inputs": "{:.4g} bits an input on average", "bytes": "{:,.0f} bytes",
        "kl": "a predicted divergence of {:.3g}",
    }  # fmt: skip
    needs = []
    for row in rows:
        least = program.solve({row: 1.0}, {})
        if least is None:
            return RecipeError("budget.choices and the overrides leave some layer no pair of widths; allow more choices")
        if (value := spent(parts, least, fixed_bytes)[row]) > most or len(rows) == 1:
            needs.append(what[row].format(value))
    if not needs:
        return RecipeError(
            f"budget.{name} {most:,.10g} cannot be met for weights and inputs together, only for each alone, by pairs of widths that "
            "budget.choices allows; raise the budget or allow narrower pairs"
        )
    return RecipeError(
        f"budget.{name} {most:,.10g} cannot be met: the {'widest' if name == 'kl' else 'narrowest'} choices take "
        f"{' and '.join(needs)}; raise the budget or allow other choices"
    )


def solver() -> tuple[Any, Any, Any]:
    """Return scipy.optimize, scipy.sparse and numpy.

    Raises:
        UnsupportedError: scipy is not installed.
    """
    try:
        import numpy
        from scipy import optimize, sparse
    except ImportError:
        raise UnsupportedError("a budget needs scipy's solver: pip install 'llm-fp4[budget]'") from None
    return optimize, sparse, numpy


class _Program:
    """One binary variable a part and width, and one a width at which two weights may share their codes."""

    def __init__(self, parts: Sequence[Part], pairs: Sequence[tuple[int, int]]) -> None:
        self._optimize, self._sparse, self._np = solver()
        self._parts = parts
        self._columns = {(p.key, b): i for i, (p, b) in enumerate((p, b) for p in parts for b in p.losses)}
        # a part: exactly one of its widths
        self._rows: list[dict[int, float]] = [{self._columns[p.key, b]: 1.0 for b in p.losses} for p in parts]
        self._low, self._high = [1.0] * len(parts), [1.0] * len(parts)
        inputs = {p.name: p for p in parts if p.kind == "input"}
        for p in parts:
            read = inputs.get(p.site) if p.site is not None else None
            if read is None or len(p.losses) == 1 or len(read.losses) == 1:
                continue
            for w in p.losses:
                for a in read.losses:
                    if (w, a) not in pairs:
                        self._at_most({self._columns[p.key, w]: 1.0, self._columns[read.key, a]: 1.0}, 1.0)
        self._quantities = {name: self._means(kind) for kind, name in _MEANS.items()}
        self._quantities["kl"] = {self._columns[p.key, b]: loss for p in parts for b, loss in p.losses.items()}
        self._quantities["bytes"] = self._bytes()

    def _at_most(self, row: dict[int, float], high: float) -> None:
        self._rows.append(row)
        self._low.append(-self._np.inf)
        self._high.append(high)

    def _means(self, kind: str) -> dict[int, float]:
        own = [p for p in self._parts if p.kind == kind]
        total = sum(p.elements for p in own)
        return {self._columns[p.key, b]: b * p.elements / total for p in own for b in p.losses}

    def _bytes(self) -> dict[int, float]:
        row = {self._columns[p.key, b]: float(n) for p in self._parts for b, n in p.bytes.items()}
        self._count = len(self._columns)
        for p in self._parts:
            for b, owner in p.shares.items():
                both, self._count = self._count, self._count + 1
                row[both] = -float(p.bytes[b])  # what is stored once
                for key in (p.key, ("weight", owner)):
                    self._at_most({both: 1.0, self._columns[key, b]: -1.0}, 0.0)
        return row

    def solve(self, goal: Mapping[str, float], bounds: Mapping[str, float]) -> Chosen | None:
        """Return the choice that minimises the sum of the ``goal``'s quantities within the bounds of others, None if there is none."""
        rows, low, high = list(self._rows), list(self._low), list(self._high)
        for name, bound in bounds.items():
            scale = max(self._quantities[name].values(), default=1.0) or 1.0
            rows.append({c: v / scale for c, v in self._quantities[name].items()})
            low.append(-self._np.inf)
            high.append(bound / scale)
        cost = self._np.zeros(self._count)
        for name, factor in goal.items():
            for column, value in self._quantities[name].items():
                cost[column] += factor * value
        entries = [(i, c, v) for i, row in enumerate(rows) for c, v in row.items()]
        at, columns, values = zip(*entries, strict=True)
        matrix = self._sparse.csr_array((values, (at, columns)), shape=(len(rows), self._count))
        result = self._optimize.milp(
            cost * (_TOTAL / max(float(abs(cost).sum()), 1e-30)), integrality=self._np.ones(self._count),
            bounds=self._optimize.Bounds(0, 1), constraints=self._optimize.LinearConstraint(matrix, low, high),
            options={"mip_rel_gap": _GAP, "node_limit": _NODES},
        )  # fmt: skip
        if result.x is None:
            return None
        return {p.key: max(p.losses, key=lambda b: result.x[self._columns[p.key, b]]) for p in self._parts}
