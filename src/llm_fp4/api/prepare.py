"""What is settled before a run starts: the structure, the device, the batches."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llm_fp4 import ranks
from llm_fp4.errors import RecipeError, UnsupportedError
from llm_fp4.models import Batch, Structure, WeightSource, find_structure, kept_whole, separate_experts
from llm_fp4.nn import patch_embeddings, put_together, separate_patches
from llm_fp4.pipeline.prefix import check_prefix
from llm_fp4.recipe import FLOAT_BITS, Recipe, matches

_BATCH_TOKENS = 2048


def checked_structure(model: nn.Module, recipe: Recipe, source: WeightSource | None = None) -> Structure:
    """Return the structure of ``model`` once the recipe is known to fit it, before anything is loaded.

    Experts in one tensor are taken apart first, see :func:`llm_fp4.models.separate_experts`, and patch embeddings become linears.

    Args:
        source: of the model's weights; None where they are in memory.
    Raises:
        UnsupportedError: no blocks, nothing selected, or a layer asked for by name that cannot be quantized. RecipeError: a pattern that matches nothing.
    """
    put_together(model)
    whole = separate_experts(model, source, recipe.selects)
    possible = [f"{n}.patches" for n in patch_embeddings(model)] if recipe.patches else []
    for name in separate_patches(model, partial(_quantizes_patches, recipe)) if recipe.patches else ():
        for own in ("weight", "bias"):
            if source is not None:
                source.part(f"{name}.patches.{own}", f"{name}.{own}", None, False)
    structure = find_structure(model)
    if recipe.transforms.rotation != "none":  # the head takes over the last norm's gain, the embedding does not
        structure = replace(structure, tied={})
    if not structure.blocks:
        raise UnsupportedError(
            f"{type(model).__name__} has no list of repeated blocks with linear layers; nothing can be quantized block by block"
        )
    _check_cache(model, recipe)
    if recipe.inputs.sinks == "prefix":
        check_prefix(model, structure)
    recipe.check_patterns([*structure.names(), *structure.others, *structure.floats, *whole, *possible])
    for pattern in recipe.targets:
        named = [n for n in structure.floats if matches(pattern, n)]
        if named and not any(matches(pattern, n) for n in structure.names()):
            raise UnsupportedError(
                f"{named[0]} stays in float: it is {structure.floats[named[0]]}; leave {pattern!r} out of targets"
            )
    if left := [n for n in structure.others if recipe.selects(n) and n not in whole.values()]:
        kind = type(model.get_submodule(left[0])).__name__
        raise UnsupportedError(
            f"{left[0]} is a {kind}, whose weight this version cannot quantize ({len(left)} such modules); "
            f"leave them in float with --ignore {left[0].rpartition('.')[2]}"
        )
    chosen = [n for n in structure.names() if recipe.selects(n)]
    if not chosen:
        raise UnsupportedError("targets and ignore leave no layer to quantize; widen targets or ignore less")
    for alias, owner in structure.aliases.items():
        if recipe.selects(alias) != recipe.selects(owner):
            raise RecipeError(f"{alias} shares the weight of {owner}, so both or none are quantized; ignore or target both")
    anything = False
    for name in chosen:
        if name in structure.embeddings or name in structure.aliases:
            anything |= bool(recipe.embedding_formats())
            continue
        rule = recipe.rule(name, head=name in structure.outer_linears)  # impossible formats are refused here
        anything |= bool(rule.weight_formats)
        if rule.input_formats and not rule.weight_formats and name not in structure.outer_linears:
            raise RecipeError(
                f"{name} has a quantized input and a float weight, which is not implemented; give it weight bits or ignore it"
            )
    if recipe.budget is not None:
        _check_budget(recipe, structure, [n for n in chosen if n not in structure.aliases])
    if not anything and not recipe.cache_formats():
        raise RecipeError(f"bits {recipe.bits} leave every selected layer in float; give embedding or weight 3 to 8 bits")
    return structure


def _check_budget(recipe: Recipe, structure: Structure, names: list[str]) -> None:
    """Raise RecipeError where no choice can be within the average, or a width has no candidate format."""
    assert recipe.budget is not None
    if recipe.method == "smoothquant":
        raise UnsupportedError("a budget beside method smoothquant is not implemented; use fpq or minmax")
    uncounted = "learned maps" if recipe.transforms.learned else "offsets" if recipe.inputs.offset != "none" else ""
    if recipe.budget.bytes is not None and uncounted:
        raise UnsupportedError(f"budget.bytes does not count {uncounted} of inputs; give average_bits or kl instead")
    weights, inputs = [], []
    for weight, activation in recipe.budget.pairs:
        rules = recipe.at(weight, activation)
        for name in names:
            if name in structure.embeddings:
                weights += [f.bits for f in rules.embedding_formats()]
                continue
            rule = rules.rule(name, head=name in structure.outer_linears)
            weights += [f.bits for f in rule.weight_formats]
            inputs += [f.bits for f in rule.input_formats] or [FLOAT_BITS]
    wanted = recipe.budget.average_bits
    for what, widths in (("weights", weights), ("inputs", inputs)):
        if wanted is not None and widths and min(widths) > wanted:
            raise RecipeError(
                f"budget.average_bits {wanted:g} cannot be met: no choice gives {what} fewer than {min(widths)} bits; raise it or allow other choices"
            )


def _quantizes_patches(recipe: Recipe, name: str) -> bool:
    return recipe.selects(name) and bool(recipe.rule(name, head=True).weight_formats)  # head: outside the blocks


def _check_cache(model: nn.Module, recipe: Recipe) -> None:
    """Raise UnsupportedError where the recipe wants a cache of codes and the model keeps no keys and values, or not all of them."""
    if not recipe.cache_formats():
        return
    generates = getattr(model, "can_generate", None)
    if generates is not None and not generates():
        raise UnsupportedError(f"{type(model).__name__} does not generate, so it keeps no keys and values; leave out --cache-bits")
    if (whole := kept_whole(model)) is not None and not any(whole):
        raise UnsupportedError(
            f"every layer of {type(model).__name__} keeps a sliding window or a state instead of all keys and values, "
            "which is not implemented in codes; leave out --cache-bits"
        )


def token_batches(model: nn.Module, tokens: Tensor, device: torch.device) -> list[Batch]:
    """Return (sequences, length) token ids as batches of about 2,048 tokens; the split depends on neither the machine nor the ranks."""
    size = max(1, _BATCH_TOKENS // tokens.shape[1])
    return [as_batch(model, {"input_ids": part}, device) for part in torch.split(tokens, size)]


def checked_device(name: str) -> torch.device:
    """Return the device called ``name``; of several ranks each has a GPU of its own.

    Raises:
        UnsupportedError: there is no such device, or torch sees none.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UnsupportedError(f"unknown device {name!r}; use cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"device {name} is not implemented; use cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError("device cuda: this PyTorch sees no CUDA device; use cpu")
    if device.type == "cuda" and (number := ranks.device_number()) is not None:
        device = torch.device("cuda", number)
    return device


@contextmanager
def float32_everywhere(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Compute in true float32 on every device while the block holds."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def route_attention(model: nn.Module, recipe: Recipe) -> None:
    """Let the attention of ``model`` run where its products can be seen and quantized, if the recipe wants that.

    Where the model has no such seam its attention stays in float, and the plan says so; a prefix is refused then.
    """
    if recipe.inputs.sinks == "prefix":
        from llm_fp4.integrations.attention import use_prefixed_attention

        if not use_prefixed_attention(model):
            raise UnsupportedError(
                f"{type(model).__name__} does not run attention through transformers' interface, so a prefix has no place in it; "
                "set inputs.sinks to per_token"
            )

    if recipe.attention_formats()[0] or recipe.cache_formats():
        from llm_fp4.integrations.attention import use_quantized_attention

        use_quantized_attention(model)


def as_batch(model: nn.Module, batch: Any, device: torch.device) -> Batch:
    """Return one calibration input as keyword arguments of ``model``, its tensors on ``device``, without a cache of keys."""
    parameters = inspect.signature(model.forward).parameters
    if isinstance(batch, Tensor):
        batch = {next(iter(parameters)): batch}
    elif isinstance(batch, tuple | list):
        batch = dict(zip(parameters, batch, strict=False))
    out = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in dict(batch).items()}
    if "use_cache" in parameters:
        out.setdefault("use_cache", False)
    return out
