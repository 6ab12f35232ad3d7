"""Output heads that share the stored codes of a token embedding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llm_fp4.calibration import collect
from llm_fp4.models import Batch, BlockRunner, Structure, WeightSource, set_module
from llm_fp4.numerics import PerRow, QuantizedTensor, parse
from llm_fp4.plan import FixedWeight, WeightPlan
from llm_fp4.progress import Progress
from llm_fp4.recipe import Recipe
from llm_fp4.statistics import SiteStatistics
from llm_fp4.storage import write_tensors

STAGE = "float statistics of the output head"
Runs = list[tuple[Callable[[], object], Tensor | None]]


def shared_heads(structure: Structure, recipe: Recipe) -> dict[str, str]:
    """Return head → embedding of the tied pairs that stay one stored tensor: both quantized, with the same candidate formats."""
    shared = {}
    for head, embedding in structure.tied.items():
        formats = recipe.embedding_formats() if recipe.selects(head) and recipe.selects(embedding) else ()
        rule = recipe.rule(head, head=True) if formats else None
        if rule and rule.weight_formats == formats and rule.weight_blocks is None:  # embeddings have a scale a row
            shared[head] = embedding
    return shared


def stored_embedding(head: str, plan: dict[str, Any], packed: Tensor, scale: Tensor, shape: tuple[int, int]) -> FixedWeight:
    """Return the weight of a head that shares its embedding's codes.

    Args:
        plan: of the embedding, as JSON. packed, scale: as stored. shape: (rows, columns).
    """
    fmt = parse(plan["format"])
    return FixedWeight(WeightPlan(head, fmt, scale), QuantizedTensor(packed, scale, fmt, PerRow(), shape).dequantize())


def float_head_gram(
    head: str, runner: BlockRunner, structure: Structure, source: WeightSource, batches: list[Batch], folder: Path,
    runs: Callable[[Callable[[int], object]], Runs], device: torch.device, seed: int, progress: Progress,
) -> Tensor:  # fmt: skip
    """Return X'X of the head's input in the float model, streamed block by block.

    Args:
        folder: for hidden states and rows. runs: pairs a run of every batch with the batch's mask.
    """
    model = runner.model
    hidden = {i: folder / f"float-{i}.safetensors" for i in range(len(batches))}
    for i, batch in enumerate(batches):
        write_tensors(hidden[i], {"hidden": runner.first_hidden(batch)})
    for index, name in enumerate(structure.blocks):
        block = source.load(model, name, device)
        for i, batch in enumerate(batches):
            x = load_file(hidden[i])["hidden"].to(device)
            write_tensors(hidden[i], {"hidden": runner.run(index, block, batch, x)})
        source.release(model, name)
        progress(STAGE, index + 1, len(structure.blocks))

    def run(i: int) -> object:
        return runner.tail(batches[i], load_file(hidden[i])["hidden"].to(device))

    stub = nn.Identity()
    module = model.get_submodule(head)
    set_module(model, head, stub)  # only its input is wanted
    try:
        store = collect({head: stub}, runs(run), folder)[head]
    finally:
        set_module(model, head, module)
    gram = SiteStatistics(head, store, device, seed).gram
    store.delete()
    return gram
