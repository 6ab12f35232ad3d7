"""Sites that are decided together: one, or all experts of a layer, whose inputs one pass over the calibration data collects."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_fp4 import ranks
from llm_fp4.calibration import collect
from llm_fp4.errors import UnsupportedError
from llm_fp4.pipeline.sites import Decided, Linears, decide_site, transform_of
from llm_fp4.pipeline.tied import Runs
from llm_fp4.plan import FixedWeight
from llm_fp4.recipe import Recipe
from llm_fp4.statistics import FloatRows, TokenStore
from llm_fp4.transforms import InputTransform

Wave = list[list[str]]


def waves(groups: list[list[str]], rare: Collection[str], recipe: Recipe, head: bool = False) -> list[Wave]:
    """Return ``groups`` in the order they are decided: experts of one list (gate_up_proj, say) that are treated alike together.

    Args:
        rare: the linears that are experts.
    """
    out: list[Wave] = []
    found: dict[Any, Wave] = {}
    for group in groups:
        name = group[0]
        key = (name.rpartition(".")[0], recipe.rule(name, head=head).site) if name in rare else None
        if key in found:
            found[key].append(group)
        else:
            out.append([group])
            if key is not None:
                found[key] = out[-1]
    return out


def decide_wave(
    wave: Wave, selected: Linears, runs: Runs, recipe: Recipe, fixed: dict[str, FixedWeight], plans: dict[str, Any],
    folder: Path, device: torch.device, head: bool = False, transform: InputTransform | None = None,
    gradients: Mapping[str, Tensor] | None = None, wanted: FloatRows | None = None,
) -> list[Decided]:  # fmt: skip
    """Return the decisions of a wave's sites, after their inputs were collected; ``plans`` gains their JSON.

    An expert that no calibration token reached is calibrated on the tokens that reached the others; its plan says so.

    Args:
        fixed: operands whose weight is decided already. folder: for the rows. transform: learned, of the input as it arrives.
        gradients: of the loss at the operands' outputs, where errors count by them.
        wanted: the float model's rows at a wave's only site, which its error compensation is to make up for.
    Raises:
        UnsupportedError: no token reached any of the experts, or not each of them where several processes share the run.
    """
    names = [group[0] for group in wave]
    transform = transform or transform_of(recipe.rule(names[0], head=head))
    stores = collect({n: selected[n] for n in names}, runs, folder, transform.rows if transform is not None else None)
    if not stores:
        raise UnsupportedError(
            f"{names[0]} did not run on the calibration data, so it cannot be quantized; add --ignore {names[0]}"
        )
    idle = [n for n in names if n not in stores]
    reached = len(stores)
    if idle and not ranks.alone():
        raise UnsupportedError(
            f"no calibration token reached {idle[0]}, which is not implemented for several processes; use one, or more calibration data"
        )
    if idle:
        everything = TokenStore(folder / "all.rows", next(iter(stores.values())).channels)
        for store in stores.values():
            everything.append(store.rows)
        stores |= dict.fromkeys(idle, everything)
    if wanted is not None and transform is not None:
        wanted = replace(wanted, change=transform.rows)
    decided = []
    for group in wave:
        store = stores[group[0]]
        decided.append(decide_site(group, selected, store, recipe, fixed, plans, device, head, transform, gradients, wanted))
        if group[0] in idle:
            plans["weights"][group[0]]["reason"] = (
                f"no calibration token reached this expert: calibrated on the {store.tokens} of the {reached} others of its layer"
            )
    for store in stores.values():
        store.delete()
    return decided
