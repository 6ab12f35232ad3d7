"""The calibration tokens of a run: written by the model itself or read from data, and kept with the run."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from llm_fp4 import ranks
from llm_fp4.calibration import load_tokens
from llm_fp4.checkpoint import RunStore
from llm_fp4.errors import CalibrationError
from llm_fp4.models import FloatModel, InMemory
from llm_fp4.progress import Progress
from llm_fp4.recipe import Recipe


def calibration_tokens(
    opened: FloatModel, recipe: Recipe, store: RunStore, progress: Progress, given: Tensor | None = None
) -> Tensor:
    """Return the calibration tokens, written by the model or read once, by the first of several ranks, and kept with the run."""
    ranks.first(lambda: _keep(opened, recipe, store, progress, given))
    kept = store.tokens()
    assert kept is not None
    return kept


def _keep(opened: FloatModel, recipe: Recipe, store: RunStore, progress: Progress, given: Tensor | None) -> None:
    """Store the calibration tokens, unless an earlier start did."""
    c = recipe.calibration
    if store.tokens() is not None:
        return
    if given is not None:
        store.keep_tokens(given)
        return
    if opened.tokenizer is None:
        raise CalibrationError(
            f"{opened.origin} has no tokenizer, so text cannot calibrate it; use quantize_module with batches of your own"
        )
    model = None
    if c.source == "self":
        model = opened.model if isinstance(opened.source, InMemory) else whole_float_model(opened)
    tokens = load_tokens(
        c.source, opened.tokenizer, sequences=c.sequences, length=c.length, seed=recipe.seed, model=model, progress=progress
    )
    store.keep_tokens(tokens)
    del model
    gc.collect()


def whole_float_model(opened: FloatModel) -> nn.Module:
    """Return the float model loaded whole, to write its own calibration text.

    Raises:
        CalibrationError: it does not fit the free memory.
    """
    need = sum(p.numel() for p in opened.model.parameters()) * 4
    free = _free_memory()
    if free is not None and need * 1.2 > free:
        raise CalibrationError(
            f"the float model must write its calibration data, all of it in memory ({need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free); "
            "name a text file or a hub data set instead"
        )
    model: nn.Module = cast(Any, type(opened.model)).from_pretrained(opened.folder, dtype=torch.float32)
    return model.eval()


def _free_memory() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
