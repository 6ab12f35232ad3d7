"""One input site: which linears share it, its search, and its quantized layers."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llm_fp4.checkpoint import site_spec
from llm_fp4.errors import RecipeError, UnsupportedError
from llm_fp4.nn import QuantLinear, linear_weight
from llm_fp4.numerics import PerBlock, parse, parse_granularity, quantize_tensor, require_finite
from llm_fp4.pipeline.importance import balanced_importance, site_importance
from llm_fp4.plan import FixedWeight, SiteResult
from llm_fp4.recipe import ModuleRule, Recipe
from llm_fp4.search import search_site
from llm_fp4.statistics import FloatRows, SiteStatistics, TokenStore
from llm_fp4.transforms import HadamardTransform, InputTransform

Linears = dict[str, nn.Module]
BALANCED = "outlier tokens together count no more than all others"


def selected_linears(model: nn.Module, names: list[str], recipe: Recipe, head: bool = False) -> Linears:
    """Return those of the linears ``names`` that the recipe quantizes and that still are float."""
    found = {}
    for n in names:
        if recipe.selects(n):
            rule, module = recipe.rule(n, head=head), model.get_submodule(n)
            if not hasattr(module, "weight_packed") and (rule.weight_formats or (rule.input_formats and not head)):
                found[n] = module
    return found


def split_sites(
    groups: list[list[str]], selected: Linears, recipe: Recipe, head: bool = False, rare: Collection[str] = ()
) -> list[list[str]]:
    """Return groups split where operands of one tensor ask for different inputs.

    Args:
        rare: linears that may be idle (experts); each is a group of its own then.
    Raises:
        UnsupportedError: a selected linear did not run, so that nothing is known of its input.
    """
    ran = {n for g in groups for n in g}
    if twice := [n for n in ran if sum(n in g for g in groups) > 1]:
        raise UnsupportedError(f"{twice[0]} runs on several inputs in one pass, which is not implemented; add --ignore {twice[0]}")
    groups = groups + [[n] for n in selected if n in rare and n not in ran]
    if idle := sorted(set(selected) - ran - set(rare)):
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
    group: list[str], selected: Linears, store: TokenStore, recipe: Recipe, fixed: dict[str, FixedWeight], plans: dict[str, Any],
    device: torch.device, head: bool = False, transform: InputTransform | None = None, gradients: Mapping[str, Tensor] | None = None,
    wanted: FloatRows | None = None,
) -> Decided:  # fmt: skip
    """Return the decision of one site; ``plans`` gains its JSON.

    Args:
        store: rows of its input, transformed already. fixed: operands whose weight is decided already.
        transform: of the input, as it arrives. gradients: of the loss at the operands' outputs, where errors count by them.
        wanted: the float model's rows, transformed too, which error compensation is to make up for.
    """
    name = group[0]
    weights = {n: linear_weight(selected[n]).float() for n in group}
    for n, w in weights.items():
        require_finite(w, f"the weight of {n}")
    rules = {n: recipe.rule(n, head=head) for n in group}
    if transform is not None:
        weights = {n: transform.weight(w) for n, w in weights.items()}
    importance = None if gradients is None else site_importance(gradients, weights, store.tokens)
    counted = importance
    if recipe.search.outlier_tokens is not None:
        counted = balanced_importance(store, weights, recipe.search.outlier_tokens, importance)
    statistics = SiteStatistics(name, store, device, recipe.seed ^ zlib.crc32(name.encode()), counted)
    result = search_site(name, weights, statistics, rules, recipe, fixed, wanted)
    if counted is not importance and result.input is not None:
        result.input.reason = "; ".join(r for r in (result.input.reason, BALANCED) if r)
    if transform is not None and result.input is not None:
        transform.tell(result.input)
    added = {n: {"added_bias": True} for n in result.bias if getattr(selected[n], "bias", None) is None}
    plans["weights"] |= {n: {"kind": "linear", **p.to_json(), **added.get(n, {})} for n, p in result.weights.items()}
    if result.input is not None:
        plans["inputs"][name] = result.input.to_json()
    return Decided(weights, selected, result)


def transform_of(rule: ModuleRule) -> InputTransform | None:
    """Return what the recipe lets an input pass before it is quantized."""
    return HadamardTransform() if rule.transform and rule.input_formats else None


def quantized_layers(site: Decided) -> dict[str, QuantLinear]:
    """Return the quantized layers of a decided site, by name."""
    plan, layers = site.result.input, {}
    for n, w in site.weights.items():
        source = site.result.rounded.get(n, w if plan is None or plan.smooth is None else w * plan.smooth)
        chosen = site.result.weights[n]
        quantized = quantize_tensor(source, chosen.scale.to(w.device), chosen.format, chosen.granularity, n, chosen.second_scale)
        layers[n] = QuantLinear.from_plan(quantized, plan, getattr(site.modules[n], "bias", None), site.result.bias.get(n))
    return layers


def stored_layer(
    name: str, plans: dict[str, Any], tensors: dict[str, Tensor], shape: tuple[int, int], device: torch.device
) -> QuantLinear:
    """Return the layer ``name`` as a finished unit stored it.

    Args:
        plans: of the unit. tensors: of its shard. shape: (out, in).
    """
    site = next((s for s in plans["inputs"].values() if name in s["operands"]), None)
    spec = site_spec(site) if site is not None else None
    weight = plans["weights"][name]
    blocks = parse_granularity(weight["granularity"]) if "granularity" in weight else None
    assert blocks is None or isinstance(blocks, PerBlock)
    own = {t.removeprefix(f"{name}."): v.to(device) for t, v in tensors.items() if t.startswith(f"{name}.")}
    layer = QuantLinear(shape[1], shape[0], parse(weight["format"]), spec, "bias" in own, "meta", blocks=blocks)
    for key, value in own.items():
        setattr(layer, key, value.float() if key == "bias" else value)
    return layer
