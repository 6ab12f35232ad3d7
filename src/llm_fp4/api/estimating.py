"""What a quantization run will cost before it starts: bytes of the checkpoint, memory, work and time."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from llm_fp4.api.fisher import gradient_memory
from llm_fp4.api.prepare import checked_device, checked_structure
from llm_fp4.models import FloatModel, InMemory, Structure, open_model, weight_shapes
from llm_fp4.pipeline import checkpoint_bytes
from llm_fp4.pipeline.choosing import TRIAL_TOKENS
from llm_fp4.recipe import ModuleRule, Recipe, load_recipe
from llm_fp4.search.shift import shift_limits

# candidates of a scale in the first round and in later ones, of each format in the race (search.grids.Log2Grid)
_SWEEP, _REFINE, _AGAIN = 7, 6, 8
_BLOCK_CANDIDATES, _JOINT_SWEEPS = 10, 2  # search.block_scales
_COPIES = 10  # of a block's weights, while its rounding or the maps of its inputs are learned
_GRADIENT = 3  # forward passes that one with gradients costs (pipeline.learning)


@dataclass(frozen=True)
class Estimate:
    """The cost of a run.

    Attributes:
        bytes: of the checkpoint's tensors; channel shifts and learned maps are counted wherever there may be some, offsets and a prefix nowhere.
            Under a budget: what it allows, and for a divergence the widest choices.
        float_bytes: of the float model's. memory: bytes beside the program itself and mapped files.
        passes: work in forward passes of the float model over all calibration tokens.
        seconds: of the products, which alone are counted, at the speed of float32 measured now: bfloat16 and int8 units do them
            faster, rounding and reading come on top. Without calibration text that the model writes itself.
    """

    bytes: int
    float_bytes: int
    memory: int
    passes: float
    seconds: float


def estimate(source: str | Path | FloatModel, recipe: Recipe | str = "fpq", *, device: str = "cpu") -> Estimate:
    """Return what quantizing ``source`` by ``recipe`` will cost; no weight is read.

    Raises:
        SourceError: the model cannot be read. RecipeError, UnsupportedError: the recipe does not fit it, or there is no such device.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    target = checked_device(device)
    opened = source if isinstance(source, FloatModel) else open_model(str(source))
    structure = checked_structure(opened.model, recipe, opened.source)
    shapes = weight_shapes(opened.model, structure)
    tokens = recipe.calibration.sequences * recipe.calibration.length
    forward = 2.0 * tokens * sum(math.prod(shapes[n]) for n in (*structure.outer_linears, *_inner(structure)))
    work = sum(_block_work([(shapes[n], recipe.rule(n)) for n in structure.linears[b] if recipe.selects(n)], recipe, tokens)
               for b in structure.blocks)  # fmt: skip
    for name in structure.outer_linears:
        if recipe.selects(name):
            work += _block_work([(shapes[name], recipe.rule(name, head=True))], recipe, tokens)
    # each block runs once to its end, and once to each of its sites, half way on average
    work += forward * (1 + _sites(structure) / 2 if recipe.search.propagation == "sequential" else 1)
    work += forward if recipe.search.compensation == "gptaq" else 0.0
    if recipe.budget is not None:
        parts = sum(len(structure.linears[b]) for b in structure.blocks) / len(structure.blocks) + _sites(structure)
        work += (2 + parts * (len(structure.blocks) + 1) / 2) * forward * recipe.budget.tokens / tokens
    if recipe.inputs.sinks == "prefix":
        work += 2 * forward * min(1.0, TRIAL_TOKENS / tokens)  # without a prefix and with the shortest
    inner = 2.0 * tokens * sum(math.prod(shapes[n]) for n in _inner(structure))
    if recipe.transforms.learned:
        work += (_GRADIENT * recipe.transforms.epochs + 2) * inner
    if recipe.search.reconstruction == "block":
        work += (_GRADIENT * recipe.search.reconstruction_epochs + 2) * inner
    memory = _memory(opened.model, structure, shapes)
    if recipe.calibration.source == "self" and not isinstance(opened.source, InMemory):
        memory = max(memory, 4 * sum(p.numel() for p in opened.model.parameters()))  # it writes the text whole
    if recipe.search.reconstruction == "block" or recipe.transforms.learned:
        first = structure.linears[structure.blocks[0]]
        states = 2 * tokens * max(shapes[n][1] for n in first[:1])  # what goes into the block, and what is to come out
        memory = max(memory, 4 * (_COPIES * sum(math.prod(shapes[n]) for n in first) + states))
    if recipe.search.objective == "fisher":
        work += (_GRADIENT - 1) * forward  # inputs alone get a gradient, parameters none
        memory = max(memory, gradient_memory(opened.model, structure, recipe.calibration.length))
    return Estimate(
        _bytes(opened, structure, shapes, recipe), opened.bytes_float, memory,
        work / forward, work / _speed(target),
    )  # fmt: skip


def _inner(structure: Structure) -> list[str]:
    return [n for names in structure.linears.values() for n in names]


def _sites(structure: Structure) -> int:
    """Return how many inputs a block has, taking linears of one parent for readers of one input."""
    return len({n.rpartition(".")[0] for n in structure.linears[structure.blocks[0]]}) + 2


def _block_work(linears: list[tuple[tuple[int, int], ModuleRule]], recipe: Recipe, tokens: int) -> float:
    """Return the floating-point operations of the search in some linears, products only."""
    search, work = recipe.search, 0.0
    for (out, width), rule in linears:
        if not rule.weight_formats:
            continue
        square, product = 2.0 * out * width * width, 2.0 * out * width
        gram = 2.0 * 3 * tokens * width * width / 2  # one input is read by about two linears
        if recipe.method in ("minmax", "smoothquant") or not rule.input_formats:
            work += gram / 3
        if recipe.method in ("minmax", "smoothquant"):
            continue
        if rule.weight_blocks is not None:
            work += gram + len(rule.weight_formats) * (
                _BLOCK_CANDIDATES * product * rule.weight_blocks.block_size + _JOINT_SWEEPS * square
            )
        else:
            rounds = search.rounds if rule.input_formats else 1  # without an input to choose there is nothing to repeat
            first, later = len(rule.weight_formats) * _SWEEP + 2 * _REFINE, 2 * _AGAIN * (rounds - 1)
            work += (rounds * gram if rule.input_formats else 0.0) + (first + later) * square
            specs = sum(len(shift_limits(f, rule.shift_range if rule.shift else 0)) for f in rule.input_formats)
            work += (specs * 2 * _SWEEP + 2 * _REFINE + later) * 2 * product * min(search.sample_tokens, tokens) if specs else 0
        if search.compensation != "none":
            work += (
                (gram if search.compensation == "gptaq" else 0.0)
                + search.starts * (search.sweeps + 1) * 1.5 * square
                + search.starts * 4.0 * width**3
            )
    return work


def _bytes(opened: FloatModel, structure: Structure, shapes: dict[str, tuple[int, int]], recipe: Recipe) -> int:
    if recipe.budget is None:
        return checkpoint_bytes(opened.model, opened.source, structure, shapes, recipe)
    if recipe.budget.bytes is not None:
        return recipe.budget.bytes
    pairs = recipe.budget.pairs
    narrow, wide = (checkpoint_bytes(opened.model, opened.source, structure, shapes, recipe.at(*p)) for p in (pairs[0], pairs[-1]))
    if recipe.budget.average_bits is None or pairs[0][0] == pairs[-1][0]:
        return wide
    share = (recipe.budget.average_bits - pairs[0][0]) / (pairs[-1][0] - pairs[0][0])
    return round(narrow + min(share, 1.0) * (wide - narrow))


def _memory(model: nn.Module, structure: Structure, shapes: dict[str, tuple[int, int]]) -> int:
    """Return the float32 bytes of the larger of a block and what lies outside, and of the search in its largest site."""
    inside = sum(p.numel() for p in model.get_submodule(structure.blocks[0]).parameters())
    outside = sum(math.prod(shapes[n]) for n in (*structure.embeddings, *structure.outer_linears) if n not in structure.tied)
    search = max(
        4 * columns**2 + 4 * rows * columns for rows, columns in (shapes[n] for n in structure.linears[structure.blocks[0]])
    )
    return 4 * (max(inside, outside) + search)


def _speed(device: torch.device) -> float:
    """Return the float32 operations a second of a square product on ``device``, measured for a moment."""
    a = torch.randn(1024, 1024, device=device)
    a @ a
    began, runs = time.perf_counter(), 0
    while time.perf_counter() - began < 0.3:
        float((a @ a)[0, 0])  # waits for the device
        runs += 1
    return runs * 2.0 * 1024**3 / (time.perf_counter() - began)
