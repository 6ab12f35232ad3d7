"""In which order the two codes of a byte were meant, told without a reference.

A neuron of a feed-forward layer is a row of one matrix and a column of the next, and the two norms are related in trained
models. Rows cannot be exchanged by a wrong order of nibbles, columns can. So: between groups of columns that an order only
permutes within, the relation is seen whatever the order; within the groups it must have the same sign, and has it only under
the order that was meant.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_fp4.doctor.findings import Problem
from llm_fp4.doctor.measures import Measures

# a matrix whose columns are neurons ← the one whose rows they are
_WRITERS = {
    "mlp.down_proj": "mlp.up_proj", "ffn_down": "ffn_up", "fc2": "fc1", "mlp.c_proj": "mlp.c_fc", "output.dense": "intermediate.dense",
    "lin2": "lin1", "w2": "w3", "DenseReluDense.wo": "DenseReluDense.wi_1",
}  # fmt: skip
CERTAIN = 5.0  # standard deviations


@dataclass
class Evidence:
    """How well orders fit one weight, in standard deviations: as declared, and under each other order."""

    name: str
    declared: float
    others: dict[str, float]


def evidence(measured: dict[str, Measures]) -> Iterator[Evidence]:
    """Yield what each feed-forward layer tells whose two matrices are quantized."""
    for name, m in measured.items():
        writer = next((name[: -len(r)] + w for r, w in _WRITERS.items() if re.search(rf"(^|\.){re.escape(r)}$", name)), None)
        if writer is None or not m.weight.orders or not bool((m.columns > 0).all()):
            continue
        if writer not in measured:
            continue
        rows = measured[writer].rows
        if len(rows) != len(m.columns) or not bool((rows > 0).all()):
            continue
        group = math.lcm(*(len(order) for order in m.weight.orders.values()))
        if len(rows) % group or len(rows) < 4 * group:
            continue
        # (groups, group)
        trusted, stored = rows.log().view(-1, group), m.columns.log().view(-1, group)
        sign = _score(trusted.mean(1), stored.mean(1))
        if abs(sign) < 2:  # no relation is seen
            continue
        within = [t - t.mean(1, keepdim=True) for t in (trusted, stored)]
        fits = {
            other: math.copysign(1, sign) * _score(within[0], _moved(within[1], order, group), group)
            for other, order in {"": torch.arange(group), **m.weight.orders}.items()
        }
        yield Evidence(name, fits.pop(""), fits)


def _moved(x: Tensor, order: Tensor, group: int) -> Tensor:
    whole = (torch.arange(0, group, len(order))[:, None] + order).flatten()
    return x[:, whole]


def _score(a: Tensor, b: Tensor, group: int = 0) -> float:
    """Return the correlation of ``a`` and ``b`` in standard deviations from none."""
    a, b = (a - a.mean()).flatten(), (b - b.mean()).flatten()
    free = a.numel() * (1 - 1 / group) if group else a.numel()
    return float((a @ b) / (a.norm() * b.norm()).clamp_min(1e-30)) * math.sqrt(free)


def order_problems(found: list[Evidence]) -> tuple[list[Problem], str]:
    """Return the weights whose codes fit another order, and a sentence on what could be told."""
    problems = [
        Problem("nibble order", e.name, f"the norms of neurons fit {other}, by {z:.0f} standard deviations ({e.declared:.0f} as declared)")
        for e in found for other, z in [max(e.others.items(), key=lambda o: o[1])] if z > CERTAIN and z > 2 * e.declared
    ]  # fmt: skip
    if problems:
        return problems, f"nibble order: wrong in {len(problems)} of the {len(found)} feed-forward layers that can tell"
    if not found:
        return [], "nibble order: not known; no feed-forward layer's neurons tell, compare with the float model (--reference)"
    total = sum(e.declared for e in found) / math.sqrt(len(found))
    if total > CERTAIN:
        return [], f"nibble order: as declared, by {total:.0f} standard deviations over {len(found)} feed-forward layers"
    return [], "nibble order: not known; the norms of neurons do not tell here, compare with the float model (--reference)"
