"""Token embeddings: searched first, then read row by row from the disk, so that no table stays in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from llm_fp4.models import Structure, WeightSource, embedding_multiplier
from llm_fp4.nn import QuantEmbedding
from llm_fp4.numerics import PerRow, QuantizedTensor, parse, quantize_tensor, require_finite
from llm_fp4.recipe import Recipe
from llm_fp4.search import embedding_plan


class MappedEmbedding(nn.Module):
    """A float table over a mapped file: only the rows that are looked up are read, as float32."""

    def __init__(self, table: Tensor, like: nn.Module, multiplier: float) -> None:
        super().__init__()
        object.__setattr__(self, "table", table)  # neither moved nor copied with the model
        self.num_embeddings, self.embedding_dim = table.shape
        self.padding_idx = getattr(like, "padding_idx", None)
        self.multiplier = multiplier

    @property
    def weight(self) -> Tensor:
        """The (rows, columns) table as stored."""
        return cast(Tensor, self.table)

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids.cpu()].float().to(ids.device) * self.multiplier


def selected_embeddings(structure: Structure, recipe: Recipe) -> list[str]:
    """Return the names of the tables to be quantized, those that only share another's weight left out."""
    return [n for n in structure.embeddings if recipe.selects(n) and recipe.embedding_formats()]


def quantize_embedding(name: str, table: nn.Module, recipe: Recipe, gram: Tensor | None) -> tuple[QuantizedTensor, dict[str, Any]]:
    """Return the packed rows of one table and its plan as JSON.

    Args:
        gram: (in, in) X'X of the output head's input where a head shares the weight.
    Raises:
        NonFiniteError: the table holds NaN or infinity.
    """
    weight = cast(Tensor, table.weight).detach().float()
    require_finite(weight, f"the weight of {name}")
    plan, rounded = embedding_plan(name, weight, recipe.embedding_formats(), recipe.searched, gram)
    quantized = quantize_tensor(rounded, plan.scale, plan.format, PerRow(), name)
    return quantized, {"kind": "embedding", "multiplier": embedding_multiplier(table), **plan.to_json()}


def stored_table(plan: dict[str, Any], tensors: dict[str, Tensor], name: str, shape: tuple[int, int]) -> QuantizedTensor:
    """Return the packed rows of the table ``name`` from a unit's saved ``tensors``, which may be mapped."""
    return QuantizedTensor(
        tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"], parse(plan["format"]), PerRow(), shape
    )


def lookups(
    model: nn.Module,
    structure: Structure,
    source: WeightSource,
    packed: Callable[[str], QuantizedTensor | None],
    device: torch.device,
) -> dict[str, nn.Module]:
    """Return what stands for every token embedding from the second unit on, by name, aliases included.

    Args:
        packed: the quantized rows of a table that is to be read as quantized, else None.
    """
    found: dict[str, nn.Module] = {}
    for name in (*structure.embeddings, *structure.aliases):
        owner = structure.aliases.get(name, name)
        old = model.get_submodule(name)
        if (rows := packed(owner)) is not None:
            multiplier = old.multiplier if isinstance(old, QuantEmbedding | MappedEmbedding) else embedding_multiplier(old)
            rows = QuantizedTensor(rows.packed.to(device), rows.scale.to(device), rows.format, rows.granularity, rows.shape)
            found[name] = QuantEmbedding.from_quantized(rows, torch.float32, multiplier)
        elif not isinstance(old, MappedEmbedding) and (table := source.table(f"{owner}.weight")) is not None:
            found[name] = MappedEmbedding(table, old, embedding_multiplier(old))
    return found
