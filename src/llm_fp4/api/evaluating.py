"""Measuring models that are named by path: perplexity and distance to the float model, and multiple choice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llm_fp4.api.loading import Loaded, load_any
from llm_fp4.errors import CalibrationError
from llm_fp4.evaluation import Metrics, ZeroShot, compare, read_items, read_tokens, score_choices
from llm_fp4.evaluation import windows as cut_windows
from llm_fp4.progress import Progress, silent

Model = str | Path | nn.Module | Loaded
NAME = "model"  # of the model asked about, in what evaluate returns


def evaluate(
    path_or_model: Model, *, text: str | Path | Tensor, reference: Model | None = None, length: int = 512,
    windows: int | None = None, tokenizer: Any = None, device: str = "cpu", progress: Progress = silent,
) -> dict[str, Metrics]:  # fmt: skip
    """Return the metrics of a model under "model" and, with a reference, those of the reference under "float".

    Args:
        path_or_model: a checkpoint, a float model by directory, hub name or .gguf file, or a module.
        text: a .txt, .jsonl, .json.gz or .parquet file or a hub data set; or (n,) int64 tokens.
        reference: the float model; without it there is no KL divergence and no agreement.
        length: tokens in a window; each window is run by itself. windows: at most this many, all by default.
        tokenizer: for a module, which brings none; by default the reference's.
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
    return compare(float_model.model if float_model else None, {NAME: model.model}, cut, progress)


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
