"""Statistics of the float model's activations: what makes them hard to quantize, input site by input site."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from llm_fp4.api.calibrate import calibration_tokens
from llm_fp4.api.prepare import checked_device, checked_structure, float32_everywhere, token_batches
from llm_fp4.calibration import collect, shared_inputs
from llm_fp4.checkpoint import RunStore
from llm_fp4.errors import UnsupportedError
from llm_fp4.models import BlockRunner, FloatModel, open_model
from llm_fp4.progress import Progress, silent
from llm_fp4.recipe import Recipe
from llm_fp4.search.sinks import sink_ratio
from llm_fp4.statistics import SiteStatistics

STAGE = "activation statistics"
SAMPLE = 1024  # tokens whose quantiles are taken
_QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class SiteActivations:
    """The activations of one input site over the calibration tokens.

    The spread of magnitudes is that of log2|x|, zeros left out: a shift moves a channel by whole octaves. Its variance
    over all values is the sum of the variance between channels (of their means) and the mean variance within a channel;
    channels of one normal distribution each have about 2.57 within.

    Attributes:
        name: the site: its first operand. operands: the linears that read it. tokens: how many were seen.
        channel_absmax: (channels,) largest magnitude of each. channel_quantiles: (3, channels) 10 %, 50 % and 90 %
            quantiles of each channel's magnitudes over at most 1,024 evenly spaced tokens.
        inter_channel, intra_channel: variances of log2 magnitude, in octaves squared.
        sink_ratio: largest token maximum over the median one.
    Source: LLM-FP4, arXiv:2310.16836, section 4.2 (high inter-channel, low intra-channel variance).
    """

    name: str
    operands: list[str]
    tokens: int
    channel_absmax: Tensor
    channel_quantiles: Tensor
    inter_channel: float
    intra_channel: float
    sink_ratio: float

    @property
    def channel_spread(self) -> float:
        """Largest over median channel maximum."""
        return float(self.channel_absmax.max() / self.channel_absmax.median().clamp_min(1e-30))


def activation_statistics(
    source: str | Path | FloatModel, recipe: Recipe, *, device: str = "cpu", progress: Progress = silent
) -> list[SiteActivations]:
    """Return the statistics of every input site the recipe selects, in the order they run, of the float model.

    One block is in memory at a time, as in quantization.

    Args:
        recipe: its targets, calibration and seed are used.
    Raises:
        SourceError, CalibrationError, RecipeError: as :func:`llm_fp4.quantize`. UnsupportedError: no linear is selected.
    """
    target = checked_device(device)
    opened = source if isinstance(source, FloatModel) else open_model(str(source))
    model, structure = opened.model, checked_structure(opened.model, recipe, opened.source)
    found: list[SiteActivations] = []
    with tempfile.TemporaryDirectory() as folder, float32_everywhere(model, target):
        store = RunStore(Path(folder), {}, len(structure.blocks) + 2, shards=False)
        batches = token_batches(model, calibration_tokens(opened, recipe, store, progress), target)
        outputs = store.outputs
        runner = BlockRunner(model, structure.stacks, batches, outputs.load)
        outside = tuple(f"{b}." for b in structure.blocks)
        opened.source.load(model, "", target, lambda n: not n.startswith(outside))

        def gather(names: list[str], run: Callable[[int], object]) -> None:
            linears = {n: model.get_submodule(n) for n in names if recipe.selects(n)}
            groups = shared_inputs(linears, lambda: run(0))
            runs = [(partial(run, i), None) for i in range(len(batches))]
            sites = collect({g[0]: linears[g[0]] for g in groups}, runs, store.scratch)
            for group in groups:
                statistics = SiteStatistics(group[0], sites[group[0]], target)
                found.append(_summary(statistics, group))
                sites[group[0]].delete()

        while (name := runner.next_block()) is not None:
            progress(STAGE, sum(runner.done.values()), len(structure.blocks) + 1)
            opened.source.load(model, name, target)
            gather(structure.linears[name], partial(runner.run, name))
            for i in range(len(batches)):
                outputs.save(name, i, runner.run(name, i))
            opened.source.release(model, name)
            runner.finish(name)
            outputs.keep(runner.last_blocks())
        progress(STAGE, len(structure.blocks), len(structure.blocks) + 1)
        if any(recipe.selects(n) for n in structure.outer_linears):
            gather(structure.outer_linears, runner.tail)
        progress(STAGE, len(structure.blocks) + 1, len(structure.blocks) + 1)
    if not found:
        raise UnsupportedError("targets and ignore leave no linear layer whose input could be described; widen targets")
    return found


def _summary(statistics: SiteStatistics, operands: list[str]) -> SiteActivations:
    """Return the summary of one site, streamed over its rows in float64 sums."""
    statistics.check()
    rows = statistics.tokens.rows
    channels = rows.shape[1]
    count, total, square = (torch.zeros(channels, dtype=torch.float64) for _ in range(3))
    for part in statistics.chunks():
        magnitude = part.abs().double().cpu()
        seen = magnitude > 0
        logs = torch.where(seen, magnitude.clamp_min(1e-300).log2(), torch.zeros_like(magnitude))
        count, total, square = count + seen.sum(0), total + logs.sum(0), square + logs.square().sum(0)
    live = count > 0  # a channel that is always zero has no magnitude
    n, mean = count[live], total[live] / count[live]
    within = (square[live] / n - mean.square()).clamp_min(0)
    overall = (n * mean).sum() / n.sum() if len(n) else torch.zeros(())
    weight = n / n.sum() if len(n) else n
    sample = rows[:: max(1, -(-len(rows) // SAMPLE))].abs()
    return SiteActivations(
        operands[0], operands, len(rows), statistics.channel_absmax.cpu(),
        torch.quantile(sample, torch.tensor(_QUANTILES), dim=0),
        float((weight * (mean - overall).square()).sum()), float((weight * within).sum()),
        sink_ratio(statistics.token_absmax()),
    )  # fmt: skip
