"""Gradients of the whole float model, for the Fisher-weighted objective: what memory they take, and the one pass that gathers them."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llm_fp4 import ranks
from llm_fp4.api.calibrate import whole_float_model
from llm_fp4.api.prepare import float32_everywhere, route_attention
from llm_fp4.calibration import Part, loss_of, output_gradients, sequences_sampled
from llm_fp4.errors import UnsupportedError
from llm_fp4.models import Batch, FloatModel, InMemory, Structure, separate_experts, weight_shapes
from llm_fp4.nn import separate_patches
from llm_fp4.progress import Progress
from llm_fp4.recipe import Recipe

STAGE = "gradients of the whole float model"
_TOKENS = 512  # of a part, unless one sequence is longer
_INPUTS = 4  # images or sounds of a part
_KEPT = 2.0  # floats kept for the way back, a linear's input and output counted once


def gradient_memory(model: nn.Module, structure: Structure, length: int) -> int:
    """Return the bytes that differentiating the whole float32 model takes, estimated: its weights, and what one part keeps.

    Args:
        length: tokens in a calibration sequence.
    """
    shapes = weight_shapes(model, structure)
    width = sum(sum(shapes[n]) for n in _linears(structure))
    weights = sum(p.numel() for p in model.parameters())
    return int(4 * (weights + _KEPT * max(_TOKENS, length) * width))


def model_gradients(
    opened: FloatModel, structure: Structure, recipe: Recipe, batches: list[Batch], device: torch.device, progress: Progress
) -> dict[str, Tensor]:
    """Return the squared gradients of the float model ``opened``, read whole for this and freed again.

    Raises:
        CalibrationError: it does not fit the free memory. UnsupportedError: several processes share the run.
    """
    if not ranks.alone():
        raise UnsupportedError("objective fisher is not implemented for several processes; start one, or use --objective output")
    inside = isinstance(opened.source, InMemory)
    need = gradient_memory(opened.model, structure, recipe.calibration.length)
    whole = opened.model if inside else whole_float_model(
        opened, need, "objective fisher differentiates the float model", "use --objective output"
    )  # fmt: skip
    separate_experts(whole, None, recipe.selects)  # as those of the model that is quantized are
    separate_patches(whole, structure.names().__contains__)
    route_attention(whole, recipe)
    with float32_everywhere(whole, device):
        found = gradients_of(whole.to(device), structure, recipe, batches, progress)
    del whole
    gc.collect()
    return found


def gradients_of(
    model: nn.Module, structure: Structure, recipe: Recipe, batches: list[Batch], progress: Progress
) -> dict[str, Tensor]:
    """Return the squared gradients (see :func:`output_gradients`) of a whole float32 ``model`` in evaluation mode."""
    generator = torch.Generator().manual_seed(recipe.seed)
    linears = {n: model.get_submodule(n) for n in _linears(structure)}
    stacks = [[n for b in blocks for n in structure.linears[b]] for blocks in structure.stacks.values()]
    parts = list(_parts(model, batches, generator))
    progress(STAGE, 0, len(parts))
    share = sequences_sampled(recipe.search.sample_tokens, len(batches))
    return output_gradients(model, linears, stacks, parts, share, lambda done: progress(STAGE, done, len(parts)))


def _linears(structure: Structure) -> list[str]:
    return [*structure.outer_linears, *(n for names in structure.linears.values() for n in names)]


def _parts(model: nn.Module, batches: list[Batch], generator: torch.Generator) -> Iterator[Part]:
    """Yield the batches in parts that are small enough to be differentiated, in order."""
    for number, batch in enumerate(batches):
        tensors = [v for v in batch.values() if isinstance(v, Tensor) and v.dim() > 0]
        size = len(tensors[0])
        ids = batch.get("input_ids")
        step = max(1, _TOKENS // max(1, math.prod(ids.shape[1:]))) if isinstance(ids, Tensor) else _INPUTS
        for start in range(0, size, step):
            part = {
                k: v[start : start + step] if isinstance(v, Tensor) and v.dim() > 0 and len(v) == size else v
                for k, v in batch.items()
            }
            masks = [m if isinstance(m, Tensor) and m.dim() == 2 else None for m in map(part.get, _masks(part))]
            yield Part(partial(loss_of, model, part, generator), masks[0], masks[1], number, start, size)


def _masks(part: dict[str, Any]) -> tuple[str, str]:
    """Return the names of the masks of what runs first, and of what runs once a stack has run."""
    return "attention_mask", "decoder_attention_mask" if "decoder_input_ids" in part else "attention_mask"
