"""One input site: which linears share it, its search, and its quantized layers."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from llm_fp4.calibration import collect
from llm_fp4.errors import RecipeError, UnsupportedError
from llm_fp4.kernels import hadamard
from llm_fp4.models import set_module
from llm_fp4.nn import QuantLinear
from llm_fp4.numerics import quantize_tensor, require_finite
from llm_fp4.pipeline.tied import Runs
from llm_fp4.plan import FixedWeight, SiteResult
from llm_fp4.recipe import Recipe
from llm_fp4.search import search_site
from llm_fp4.statistics import SiteStatistics

Linears = dict[str, nn.Module]


def split_sites(groups: list[list[str]], selected: Linears, recipe: Recipe, head: bool = False) -> list[list[str]]:
    """Return groups split where operands of one tensor ask for different inputs.

    Raises:
        UnsupportedError: a selected linear did not run, so that nothing is known of its input.
    """
    ran = {n for g in groups for n in g}
    if twice := [n for n in ran if sum(n in g for g in groups) > 1]:
        raise UnsupportedError(f"{twice[0]} runs on several inputs in one pass, which is not implemented; add --ignore {twice[0]}")
    if idle := sorted(set(selected) - ran):
        raise UnsupportedError(f"{idle[0]} did not run on the calibration data, so it cannot be quantized; add --ignore {idle[0]}")
    out: dict[tuple[int, Any], list[str]] = {}
    for i, group in enumerate(groups):
        for n in group:
            rule = recipe.rule(n, head=head)
            if not rule.weight_formats:
                raise RecipeError(
                    f"{n} has a quantized input and a float weight, which is not implemented; give it weight bits or ignore it"
                )
            out.setdefault((i, rule.site), []).append(n)
    return list(out.values())


@dataclass
class Decided:
    """The float weights of a site's operands (transformed as its input is), their modules, and what the search decided."""

    weights: dict[str, Tensor]
    modules: Linears
    result: SiteResult


def decide_site(
    group: list[str], selected: Linears, runs: Runs, recipe: Recipe, fixed: dict[str, FixedWeight], plans: dict[str, Any],
    folder: Path, device: torch.device, head: bool = False,
) -> Decided:  # fmt: skip
    """Return the decision of one site, after its inputs were collected; ``plans`` gains its JSON.

    Args:
        fixed: operands whose weight is decided already. folder: for the rows.
    """
    name = group[0]
    weights = {n: cast(Tensor, selected[n].weight).detach().float() for n in group}
    for n, w in weights.items():
        require_finite(w, f"the weight of {n}")
    rules = {n: recipe.rule(n, head=head) for n in group}
    transform = hadamard if rules[name].transform and rules[name].input_formats else None
    if transform is not None:
        weights = {n: hadamard(w) for n, w in weights.items()}
    stores = collect({name: selected[name]}, runs, folder, transform)
    statistics = SiteStatistics(name, stores[name], device, recipe.seed ^ zlib.crc32(name.encode()))
    result = search_site(name, weights, statistics, rules, recipe, fixed)
    stores[name].delete()
    if transform is not None and result.input is not None:
        result.input.spec = replace(result.input.spec, transform="hadamard")
    plans["weights"] |= {n: {"kind": "linear", **p.to_json()} for n, p in result.weights.items()}
    if result.input is not None:
        plans["inputs"][name] = result.input.to_json()
    return Decided(weights, selected, result)


def replace_site(model: nn.Module, site: Decided) -> None:
    """Put the quantized layers of a decided site into ``model``."""
    plan = site.result.input
    for n, w in site.weights.items():
        source = site.result.rounded.get(n, w if plan is None or plan.smooth is None else w * plan.smooth)
        chosen = site.result.weights[n]
        quantized = quantize_tensor(source, chosen.scale.to(w.device), chosen.format, chosen.granularity, n, chosen.second_scale)
        bias = getattr(site.modules[n], "bias", None)
        set_module(model, n, QuantLinear.from_plan(quantized, plan, bias))
