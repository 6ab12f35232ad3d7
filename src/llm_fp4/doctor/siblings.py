"""Checks across layers: siblings that engines fuse, layers in float, and input scales."""

from __future__ import annotations

import re
from collections.abc import Iterator
from statistics import median

from llm_fp4.doctor.findings import Problem
from llm_fp4.doctor.measures import Measures
from llm_fp4.doctor.stored import Layers

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"))
_NO_LINEAR = re.compile(
    r"embed|norm|(^|[._])(wte|wpe|shared|lm_head|output|router|gate|classifier|score|rotary)(\.|$)|conv", re.IGNORECASE
)
_NVFP4_TOP = 448.0 * 6.0  # the largest block scale times the largest value
_INPUTS = (1e-2, 3e4)  # the largest value that inputs of a whole model reach, in the middle of its layers


def sibling_problems(measured: dict[str, Measures], layers: Layers, ours: bool) -> Iterator[Problem]:
    """Yield fused siblings of unequal global scales, or of which only some are quantized."""
    for name in measured:
        parent, _, last = name.rpartition(".")
        group = next((g for g in FUSED if g[0] == last), None)
        if group is None:
            continue
        names = [f"{parent}.{n}" for n in group]
        if kept := [n for n in names if n in layers.floats]:
            yield Problem("fused siblings, some float", name, f"{kept[0]} is float")
        found = [measured[n].weight for n in names if n in measured]
        for what, seconds in (("weights", [w.second for w in found if w.two_level]), ("inputs", [w.input_second for w in found])):
            known = [s for s in seconds if s is not None]
            if len(set(known)) > 1:
                listed = ", ".join(f"{s:.4g}" for s in known)
                yield Problem(
                    "fused siblings, ours" if ours else "fused siblings",
                    names[0],
                    f"global scales of the {what} of {', '.join(group)}: {listed}",
                )


def input_problems(measured: dict[str, Measures]) -> Iterator[Problem]:
    """Yield input scales that are no scales, or that are all the wrong way up."""
    scales = {n: m.weight.input_second for n, m in measured.items() if m.weight.input_second is not None}
    for name, scale in scales.items():
        if not 0 < scale < float("inf"):
            yield Problem("input scale", name, f"the input's scale is {scale}")
    reach = {n: s * _NVFP4_TOP for n, s in scales.items() if 0 < s < float("inf") and measured[n].weight.two_level}
    if reach and not _INPUTS[0] <= (middle := median(reach.values())) <= _INPUTS[1]:
        for name, top in reach.items():
            yield Problem(
                "input scale inverted", name, f"it lets inputs reach {top:.3g}, and {middle:.3g} in the middle of all layers"
            )


def layer_problems(measured: dict[str, Measures], layers: Layers) -> Iterator[Problem]:
    """Yield linear layers in float: skipped ones, where the checkpoint's own list does not name them."""
    if not measured:
        return
    for name, shape in layers.floats.items():
        if len(shape) != 2 or _NO_LINEAR.search(name.rpartition(".")[2]) or not re.search(r"\.\d+\.", f".{name}."):
            continue
        listed = layers.ignored is None or name in layers.ignored
        yield Problem("float layer" if listed else "skipped layer", name, f"{tuple(shape)} in float")
