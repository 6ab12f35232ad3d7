"""Measuring models that are named by path: perplexity and distance to the float model, and multiple choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llm_fp4.api.loading import Loaded, load_any
from llm_fp4.checkpoint import read_plan
from llm_fp4.errors import CalibrationError
from llm_fp4.evaluation import (
    Clipped,
    Metrics,
    ZeroShot,
    clipping_sentence,
    compare,
    read_items,
    read_tokens,
    score_choices,
    watch_clipping,
)
from llm_fp4.evaluation import windows as cut_windows
from llm_fp4.nn import CacheCodes
from llm_fp4.progress import Progress, silent

Model = str | Path | nn.Module | Loaded
CHUNK = 512  # tokens of a long window that run at once
NAME = "model"  # of the model asked about, in what evaluate returns


def evaluate(
    path_or_model: Model, *, text: str | Path | Tensor, reference: Model | None = None, length: int = 512,
    windows: int | None = None, chunk: int | None = None, tokenizer: Any = None, device: str = "cpu", progress: Progress = silent,
    warn: Callable[[str], None] | None = None,
) -> dict[str, Metrics]:  # fmt: skip
    """Return the metrics of a model under "model" and, with a reference, those of the reference under "float".

    Args:
        path_or_model: a checkpoint, a float model by directory, hub name or .gguf file, or a module.
        text: a .txt, .jsonl, .json.gz or .parquet file or a hub data set; or (n,) int64 tokens.
        reference: the float model; without it there is no KL divergence and no agreement.
        length: tokens in a window; each window is run by itself. windows: at most this many, all by default.
        chunk: run each window in pieces of so many tokens through the cache of keys and values; by default as a whole, but a
            model that keeps codes in pieces of its float window, as otherwise nothing would be read back.
        tokenizer: for a module, which brings none; by default the reference's.
        warn: called with a sentence where static scales clip far more than they did in calibration.
    Raises:
        CalibrationError: the text is missing, too short, or not made of the model's tokens.
        CheckpointError, SourceError: a model cannot be loaded. NonFiniteError: a model gives NaN.
    """
    model = _loaded(path_or_model, tokenizer, device, progress)
    float_model = None if reference is None else _loaded(reference, None, device, progress)
    if isinstance(text, Tensor):
        tokens = text
    else:
        reader = model.tokenizer or (float_model.tokenizer if float_model else None)
        if reader is None:
            raise CalibrationError(f"{model.origin} has no tokenizer to read text with; give tokenizer= or a tensor of tokens")
        tokens = read_tokens(text, reader, tokens=None if windows is None else windows * length, progress=progress)
    for each in (model, *([float_model] if float_model else [])):
        _check_fit(each, tokens, length)
    cut = cut_windows(tokens, length)[:windows]
    chunk = _float_window(model.model) if chunk is None else chunk
    clipped: list[Clipped] = []
    with ExitStack() as stack:
        if warn is not None:
            clipped = stack.enter_context(watch_clipping(model.model, _calibrated(model)))
        metrics = compare(float_model.model if float_model else None, {NAME: model.model}, cut, progress, chunk)
    if warn is not None and (sentence := clipping_sentence(clipped, length)):
        warn(sentence)
    return metrics


def evaluate_contexts(
    path_or_model: Model, lengths: Sequence[int], *, text: str | Path | Tensor, reference: Model | None = None, windows: int = 1,
    chunk: int | None = None, tokenizer: Any = None, device: str = "cpu", progress: Progress = silent,
    warn: Callable[[str], None] | None = None,
) -> dict[int, dict[str, Metrics]]:  # fmt: skip
    """Return what :func:`evaluate` returns for each length of context, on the same text.

    Args:
        lengths: tokens in a window. windows: of the longest; the shorter ones cut the same tokens into more.
        chunk: as for :func:`evaluate`; 512 by default, so that long windows fit into memory.
    Raises: as :func:`evaluate`.
    """
    model = _loaded(path_or_model, tokenizer, device, progress)
    float_model = None if reference is None else _loaded(reference, None, device, progress)
    count = max(lengths) * windows
    reader = model.tokenizer or (float_model.tokenizer if float_model else None)
    if isinstance(text, Tensor):
        tokens = text
    elif reader is None:
        raise CalibrationError(f"{model.origin} has no tokenizer to read text with; give tokenizer= or a tensor of tokens")
    else:
        tokens = read_tokens(text, reader, tokens=count, progress=progress)
    chunk = chunk or _float_window(model.model) or CHUNK
    rules: dict[str, Any] = {"text": tokens[:count], "reference": float_model, "chunk": chunk, "progress": progress, "warn": warn}
    for length in lengths:  # before the first takes minutes
        cut_windows(tokens, length)
        _check_fit(model, tokens, length)
    return {length: evaluate(model, length=length, **rules) for length in lengths}


def _float_window(model: nn.Module) -> int | None:
    """Return how many of the newest tokens ``model`` reads in float, at least 16; None where it keeps no codes."""
    windows = [m.spec.window for m in model.modules() if isinstance(m, CacheCodes)]
    return max(16, min(windows)) if windows else None


def _calibrated(loaded: Loaded) -> dict[str, float]:
    """Return the share that each static scale clipped at calibration, as the checkpoint's plan has it."""
    plan = read_plan(Path(loaded.origin)) if loaded.quantized else {}
    shares = {n: site.get("clipped") for site in plan.get("inputs", {}).values() for n in site["operands"]}
    shares |= {n: entry.get("clipped") for n, entry in plan.get("cache", {}).items()}
    return {n: share for n, share in shares.items() if share is not None}


def answer_questions(
    path_or_model: Model, files: Sequence[str | Path], *, suffix: str = "\nAnswer:", limit: int | None = None,
    tokenizer: Any = None, device: str = "cpu", progress: Progress = silent,
) -> dict[str, ZeroShot]:  # fmt: skip
    """Return the zero-shot accuracy on each JSON-lines file of questions, by the file's name without its ending.

    Args:
        suffix: between question and answer; the default makes lm-eval's prompts of ARC and PIQA.
        limit: questions a file, all by default.
    Raises:
        CalibrationError: a file is missing, damaged or empty, or the model has no tokenizer.
    """
    items = {Path(file).name.split(".")[0]: read_items(file, limit) for file in files}
    model = _loaded(path_or_model, tokenizer, device, progress)
    if model.tokenizer is None:
        raise CalibrationError(f"{model.origin} has no tokenizer to read questions with; give tokenizer=")
    return {name: score_choices(model.model, model.tokenizer, each, progress, suffix=suffix) for name, each in items.items()}


def _loaded(model: Model, tokenizer: Any, device: str, progress: Progress) -> Loaded:
    if isinstance(model, Loaded):
        return model
    if isinstance(model, nn.Module):
        return Loaded(model, tokenizer, False, type(model).__name__)
    loaded = load_any(model, device=device, progress=progress)
    loaded.tokenizer = tokenizer or loaded.tokenizer
    return loaded


def _check_fit(loaded: Loaded, tokens: Tensor, length: int) -> None:
    """Raise CalibrationError where the windows are longer, or a token is larger, than the model takes."""
    config = getattr(loaded.model, "config", None)
    longest, vocabulary = getattr(config, "max_position_embeddings", None), getattr(config, "vocab_size", None)
    if isinstance(longest, int) and 0 < longest < length:
        raise CalibrationError(
            f"{loaded.origin} takes at most {longest:,} tokens, not windows of {length:,}; set a length of {longest} or less"
        )
    if isinstance(vocabulary, int) and int(tokens.max()) >= vocabulary:
        raise CalibrationError(
            f"the text has token {int(tokens.max())}, but {loaded.origin} knows only {vocabulary:,}; use its own tokenizer"
        )
