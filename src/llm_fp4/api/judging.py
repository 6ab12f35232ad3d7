"""Measuring models on labelled data: images, tables of sentences, speech."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch

from llm_fp4.api.loading import Loaded
from llm_fp4.api.media import audio_batches, image_batches, longest, processor_of, scores, sentence_batches
from llm_fp4.calibration import media_files, read_labelled
from llm_fp4.errors import CalibrationError, UnsupportedError
from llm_fp4.evaluation import (
    TopK,
    class_logits,
    class_metrics,
    class_numbers,
    read_transcripts,
    score_metrics,
    sentence_vectors,
    similarities,
    top_k,
    transcribe,
    word_error_rate,
)  # fmt: skip

LENGTH = 128  # tokens a sentence is cut to


def judge_images(
    model: Loaded, folder: str | Path, labels: str | Path, reference: Loaded | None = None, limit: int | None = None
) -> dict[str, TopK]:
    """Return top-1 and top-5 on labelled images, under "model" and, with a reference, also "float".

    Args:
        labels: a .tsv or .csv file with a row for each image: file name, class number.
    Raises:
        CalibrationError: files are missing or unreadable, or the model has no processor or no classes.
    """
    kind, files = media_files(Path(folder))
    if kind != "image":
        raise CalibrationError(f"{folder} holds audio, not images; use --audio")
    classes = _image_labels(Path(labels))
    kept = [f for f in files if f.name in classes][:limit]
    if not kept:
        raise CalibrationError(f"{labels} names no image of {folder}; its first column must be file names")
    target = torch.tensor([classes[f.name] for f in kept])
    device = next(model.model.parameters()).device
    batches = image_batches(kept, processor_of(_folder(model), "image", model.origin), device)
    flat = None if reference is None else class_logits(reference.model, batches, reference.origin)
    found = {"model": top_k(class_logits(model.model, batches, model.origin), target, flat)}
    return found if flat is None else {**found, "float": top_k(flat, target, flat)}


def judge_table(model: Loaded, file: str | Path, limit: int | None = None) -> dict[str, float]:
    """Return the metrics of a .tsv or .csv file of sentences and labels.

    A model with a classification head is asked for classes (accuracy, Matthews, F1) or, with one output, for scores; an
    encoder without a head for the cosine of both sentences' mean vectors (Spearman, Pearson).

    Raises:
        CalibrationError: the file is not understood or does not fit the model.
        UnsupportedError: a library for the metrics is missing, or the model has neither head nor hidden states.
    """
    rows = read_labelled(file, limit)
    if model.tokenizer is None:
        raise CalibrationError(f"{model.origin} has no tokenizer to read sentences with; save one beside the model")
    net, tokenizer, device = model.model, model.tokenizer, next(model.model.parameters()).device
    length = longest(net, tokenizer, LENGTH)
    first, pairs = [r.first for r in rows], [r.second for r in rows if r.second is not None]
    second = pairs if len(pairs) == len(rows) else None
    if type(net).__name__.endswith("ForSequenceClassification"):
        logits = class_logits(net, sentence_batches(first, second, tokenizer, length, device), model.origin)
        if logits.shape[1] > 1:
            return {**class_metrics(logits.argmax(1), class_numbers([r.label for r in rows], _classes(net))), "n": len(rows)}
        return {**score_metrics(logits[:, 0], scores([r.label for r in rows], file)), "n": len(rows)}
    if second is None:
        raise UnsupportedError(
            f"{model.origin} has no classification head, and {file} no second sentence to compare the first with"
        )
    vectors = [sentence_vectors(net, sentence_batches(side, None, tokenizer, length, device)) for side in (first, second)]
    return {**score_metrics(similarities(*vectors), scores([r.label for r in rows], file)), "n": len(rows)}


def judge_speech(model: Loaded, folder: str | Path, transcripts: str | Path, limit: int | None = None) -> dict[str, Any]:
    """Return the word error rate over the audio files that have a transcript, and each file's text.

    Raises:
        CalibrationError: files are missing or unreadable. UnsupportedError: jiwer is missing.
    """
    kind, files = media_files(Path(folder))
    if kind != "audio":
        raise CalibrationError(f"{folder} holds images, not audio; use --images")
    truth = read_transcripts(transcripts)
    kept = [f for f in files if f.stem in truth][:limit]
    if not kept:
        raise CalibrationError(f"{transcripts} has no transcript of a file in {folder}")
    if model.tokenizer is None:
        raise CalibrationError(f"{model.origin} has no tokenizer to write text with; save one beside the model")
    device = next(model.model.parameters()).device
    batches = audio_batches(kept, processor_of(_folder(model), "audio", model.origin), device)
    texts = transcribe(model.model, model.tokenizer, batches)
    return {
        "wer": word_error_rate(texts, [truth[f.stem] for f in kept]), "n": len(kept),
        "texts": {f.name: t for f, t in zip(kept, texts, strict=True)},
    }  # fmt: skip


def _folder(model: Loaded) -> Path:
    return Path(getattr(model.model, "name_or_path", "") or model.origin)


def _classes(net: Any) -> dict[str, int] | None:
    found: dict[str, int] | None = getattr(net.config, "label2id", None)
    return found


def _image_labels(path: Path) -> dict[str, int]:
    if not path.is_file():
        raise CalibrationError(f"{path} does not exist; name a .tsv or .csv file of file names and class numbers")
    with path.open(encoding="utf-8", newline="") as stream:
        rows = [r for r in csv.reader(stream, delimiter="\t" if path.suffix.lower() == ".tsv" else ",") if len(r) > 1]
    found = {Path(r[0]).name: int(r[1]) for r in rows if r[1].strip().isdigit()}  # a header is no number
    if not found:
        raise CalibrationError(f"{path} holds no line of a file name and a class number")
    return found
