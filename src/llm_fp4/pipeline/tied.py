"""Output heads that share the stored codes of a token embedding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from llm_fp4 import ranks
from llm_fp4.calibration import collect
from llm_fp4.checkpoint import BlockOutputs
from llm_fp4.models import Batch, BlockRunner, Structure, WeightSource, placed
from llm_fp4.nn import linear_shape
from llm_fp4.progress import Progress
from llm_fp4.recipe import Recipe
from llm_fp4.statistics import SiteStatistics

STAGE = "float statistics of the output head"
Runs = list[tuple[Callable[[], object], Tensor | None]]


def shared_heads(structure: Structure, recipe: Recipe) -> dict[str, str]:
    """Return head → embedding of the tied pairs that stay one stored tensor: both quantized, with the same candidate formats, and
    the head reading its input as it is (the weight behind a transform is another one)."""
    shared = {}
    for head, embedding in structure.tied.items():
        formats = recipe.embedding_formats() if recipe.selects(head) and recipe.selects(embedding) else ()
        rule = recipe.rule(head, head=True) if formats else None
        if rule is None or rule.weight_formats != formats or (rule.transform and rule.input_formats):
            continue
        if rule.weight_blocks is None:  # embeddings have a scale a row
            shared[head] = embedding
    return shared


def parts(structure: Structure, recipe: Recipe) -> bool:
    """Return whether a head and its tied embedding are stored apart from now on."""
    shared = shared_heads(structure, recipe)
    for head, embedding in structure.tied.items():
        packed_head = recipe.selects(head) and recipe.rule(head, head=True).weight_formats
        packed_embedding = recipe.selects(embedding) and recipe.embedding_formats()
        if head not in shared and (packed_head or packed_embedding):
            return True
    return False


class _Nothing(nn.Module):
    """Stands for a head: zeros of the right shape, in no memory."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(()).expand(*x.shape[:-1], self.outputs)


def float_head_gram(
    head: str, model: nn.Module, structure: Structure, source: WeightSource, batches: list[Batch], folder: Path,
    runs: Callable[[Callable[[int], object]], Runs], device: torch.device, seed: int, progress: Progress,
) -> Tensor:  # fmt: skip
    """Return X'X of the head's input in the float model, streamed block by block.

    Args:
        folder: for outputs and rows. runs: pairs a run of every batch with the batch's mask.
    """
    outputs = BlockOutputs(folder / "float")
    runner = BlockRunner(model, structure.stacks, batches, outputs.load)
    stub = _Nothing(linear_shape(model.get_submodule(head))[0])
    with placed(model, {head: stub}):  # only its input is wanted
        while (name := runner.next_block()) is not None:
            source.load(model, name, device)
            for i in ranks.mine(len(batches)):
                outputs.save(name, i, runner.run(name, i))
            source.release(model, name)
            runner.finish(name)
            ranks.wait()
            ranks.first(lambda: outputs.keep(runner.last_blocks()))
            progress(STAGE, sum(runner.done.values()), len(structure.blocks))
        store = collect({head: stub}, runs(runner.tail), folder)[head]
    ranks.first(lambda: outputs.keep(()))
    gram = SiteStatistics(head, store, device, seed).gram
    store.delete()
    return gram
