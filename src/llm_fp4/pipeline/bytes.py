"""The size of a checkpoint before it is made."""

from __future__ import annotations

import math

from torch import nn

from llm_fp4.kernels import split_width
from llm_fp4.models import Structure, WeightSource
from llm_fp4.numerics import packed_width
from llm_fp4.pipeline.learning import learnable
from llm_fp4.pipeline.tied import shared_heads
from llm_fp4.recipe import Recipe


def checkpoint_bytes(
    model: nn.Module, source: WeightSource, structure: Structure, shapes: dict[str, tuple[int, int]], recipe: Recipe
) -> int:
    """Return the bytes of a checkpoint's tensors; channel shifts and learned maps are counted wherever there may be some.

    Args:
        shapes: (rows, columns) of every module a recipe can target.
    """
    shared, weights = shared_heads(structure, recipe), {f"{n}.weight" for n in shapes}
    total = sum(
        p.numel() * source.dtype(name).itemsize for name, p in model.named_parameters(remove_duplicate=False) if name not in weights
    )
    for name, (rows, columns) in shapes.items():
        if name in structure.aliases:  # its owner's tensor
            continue
        packed = weight_bytes(name, (rows, columns), structure, recipe)
        if packed is None:
            alone = name not in structure.tied or bool(recipe.selects(structure.tied[name]) and recipe.embedding_formats())
            total += rows * columns * source.dtype(f"{name}.weight").itemsize if alone else 0
            continue
        total += packed if name not in shared else 0
        rule = None if name in structure.embeddings else recipe.rule(name, head=name in structure.outer_linears)
        if rule and rule.input_formats:
            total += 4 + (columns if rule.shift else 0)
            if recipe.transforms.learned and learnable(rule) and name not in structure.outer_linears:
                total += 4 * sum(side**2 for side in split_width(columns))
        if rule and recipe.searched is not None and recipe.searched.bias_correction:
            old = getattr(model.get_submodule(name), "bias", None)
            total += 4 * rows - (0 if old is None else rows * source.dtype(f"{name}.bias").itemsize)
    return total


def weight_bytes(name: str, shape: tuple[int, int], structure: Structure, recipe: Recipe) -> int | None:
    """Return the bytes of the codes and scales of one weight by itself, None where it stays float."""
    if not recipe.selects(name):
        return None
    rows, columns = shape
    rule = None if name in structure.embeddings else recipe.rule(name, head=name in structure.outer_linears)
    formats = recipe.embedding_formats() if rule is None else rule.weight_formats
    if not formats:
        return None
    blocks = rule.weight_blocks if rule else None
    scales = math.prod(blocks.shape(rows, columns)) * blocks.torch_dtype.itemsize + 4 * blocks.two_level if blocks else 4 * rows
    return rows * packed_width(columns, formats[0].bits) + scales
