"""Model inputs made of images, audio files and tables of sentences, by the model's own processor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_fp4.calibration import TABLES, draw_files, media_files, read_audio, read_image, read_labelled
from llm_fp4.errors import CalibrationError
from llm_fp4.evaluation import class_numbers
from llm_fp4.models import Batch, FloatModel, open_processor
from llm_fp4.recipe import Recipe

SIZE = 16  # inputs of one batch


def image_batches(files: Sequence[Path], processor: Any, device: torch.device) -> list[Batch]:
    """Return pixel batches of image files."""
    return [
        {
            "pixel_values": processor(images=[read_image(f) for f in files[i : i + SIZE]], return_tensors="pt")["pixel_values"].to(
                device
            )
        }
        for i in range(0, len(files), SIZE)
    ]


def audio_batches(files: Sequence[Path], processor: Any, device: torch.device) -> list[Batch]:
    """Return batches of audio files, one file each: their lengths differ, and padding must not enter statistics."""
    found = []
    for file in files:
        wave = read_audio(file, processor.sampling_rate).numpy()
        made = processor(wave, sampling_rate=processor.sampling_rate, return_tensors="pt")
        found.append({k: v.to(device) for k, v in made.items() if k in ("input_features", "input_values")})
    return found


def sentence_batches(
    first: Sequence[str], second: Sequence[str] | None, tokenizer: Any, length: int, device: torch.device
) -> list[Batch]:
    """Return padded token batches of sentences or pairs of sentences, cut to ``length`` tokens."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    found = []
    for i in range(0, len(first), SIZE):
        pairs = (list(first[i : i + SIZE]),) if second is None else (list(first[i : i + SIZE]), list(second[i : i + SIZE]))
        made = tokenizer(*pairs, padding=True, truncation=True, max_length=length, return_tensors="pt")
        found.append({k: v.to(device) for k, v in made.items()})
    return found


def longest(model: Any, tokenizer: Any, wish: int) -> int:
    """Return ``wish`` tokens or what the model and its tokenizer take at most."""
    states = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    bound = states - 2 if isinstance(states, int) and states > 2 else wish  # RoBERTa's positions begin at 2
    return int(min(wish, bound, getattr(tokenizer, "model_max_length", wish) or wish))


def processor_of(folder: Path, kind: str, origin: str) -> Any:
    """Return the image processor or feature extractor saved in ``folder``.

    Raises:
        CalibrationError: there is none.
    """
    processor = open_processor(folder, kind)
    if processor is None:
        raise CalibrationError(f"{origin} has no processor for {kind} files; save its preprocessor_config.json beside the model")
    return processor


def source_batches(opened: FloatModel, recipe: Recipe, device: torch.device, whole: Any) -> list[Batch] | None:
    """Return the batches of a calibration source that is a directory or a table, None for any other source.

    Args:
        whole: returns the float model in memory, where a decoder has to write what it is calibrated on.
    Raises:
        CalibrationError: unreadable files, or a model without the processor they need.
    """
    c, source = recipe.calibration, Path(recipe.calibration.source)
    if source.suffix.lower() in TABLES:
        return _table(source, opened, recipe, device)
    if not source.is_dir():
        return None
    kind, files = media_files(source)
    files = draw_files(files, c.sequences, recipe.seed)
    processor = processor_of(opened.folder, kind, opened.origin)
    if kind == "image":
        return image_batches(files, processor, device)
    batches = audio_batches(files, processor, device)
    if getattr(opened.model.config, "is_encoder_decoder", False):
        model = whole()
        with torch.no_grad():
            for batch in batches:  # teacher forcing on what the float model hears
                # as a tensor alone, Whisper's answer lacks the tokens its decoder begins with
                heard: Tensor = model.generate(**batch, return_dict_in_generate=True).sequences
                batch["decoder_input_ids"] = heard[:, : max(1, heard.shape[1] - 1)].to(device)
    return batches


def _table(source: Path, opened: FloatModel, recipe: Recipe, device: torch.device) -> list[Batch]:
    if opened.tokenizer is None:
        raise CalibrationError(f"{opened.origin} has no tokenizer, so text cannot calibrate it; name images or audio files")
    rows = read_labelled(source)
    generator = torch.Generator().manual_seed(recipe.seed)
    kept = torch.randperm(len(rows), generator=generator)[: recipe.calibration.sequences].sort().values.tolist()
    first, second = [rows[i].first for i in kept], [rows[i].second or "" for i in kept]
    length = longest(opened.model, opened.tokenizer, recipe.calibration.length)
    if _has_head(opened.model):
        batches = sentence_batches(first, second if any(second) else None, opened.tokenizer, length, device)
        if recipe.search.objective == "fisher":
            _label(batches, opened.model, [rows[i].label for i in kept], source)
        return batches
    return sentence_batches([*first, *(s for s in second if s)], None, opened.tokenizer, length, device)


def _label(batches: list[Batch], model: Any, labels: list[str], source: Path) -> None:
    """Put the labels of a table into its batches, as classes or, for a model with one output, as scores."""
    numbers = scores(labels, source) if model.config.num_labels == 1 else class_numbers(labels, model.config.label2id)
    for batch, part in zip(batches, torch.split(numbers, SIZE), strict=True):
        batch["labels"] = part.to(batch["input_ids"].device)


def scores(labels: list[str], source: str | Path) -> Tensor:
    """Return the (n,) float scores that a table's labels are.

    Raises:
        CalibrationError: a label is no number.
    """
    try:
        return torch.tensor([float(x) for x in labels])
    except ValueError:
        raise CalibrationError(
            f"{source} has labels that are no numbers, but the model gives scores; use a classification model"
        ) from None


def _has_head(model: nn.Module) -> bool:
    """Return whether the model judges pairs: it has a classification head."""
    return type(model).__name__.endswith("ForSequenceClassification")
