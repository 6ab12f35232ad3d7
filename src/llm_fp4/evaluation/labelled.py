"""The metrics of GLUE: accuracy, F1 and Matthews correlation of classes, Spearman and Pearson correlation of scores."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from llm_fp4.errors import CalibrationError, UnsupportedError
from llm_fp4.evaluation.running import evaluating

INSTALL = "pip install 'llm-fp4[evaluation]'"


def class_metrics(predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """Return accuracy, Matthews correlation and, for two classes, F1 of class 1, for (n,) int64 classes.

    Raises:
        UnsupportedError: scikit-learn is not installed.
    """
    try:
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
    except ImportError:
        raise UnsupportedError(f"accuracy, F1 and Matthews correlation need scikit-learn; install it: {INSTALL}") from None
    found = {"accuracy": float(accuracy_score(labels, predicted)), "matthews": float(matthews_corrcoef(labels, predicted))}
    return found | ({"f1": float(f1_score(labels, predicted))} if int(max(labels.max(), predicted.max())) < 2 else {})


def score_metrics(predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """Return Spearman and Pearson correlation of (n,) float scores.

    Raises:
        UnsupportedError: scipy is not installed.
    """
    try:
        from scipy.stats import pearsonr, spearmanr
    except ImportError:
        raise UnsupportedError(f"Spearman and Pearson correlation need scipy; install it: {INSTALL}") from None
    return {"spearman": float(spearmanr(predicted, labels).statistic), "pearson": float(pearsonr(predicted, labels).statistic)}


def sentence_vectors(model: Any, batches: Iterable[dict[str, Tensor]]) -> Tensor:
    """Return the (n, channels) mean of the last hidden states over the tokens that are no padding."""
    found = []
    with evaluating(model):
        for batch in batches:
            hidden = model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"].unsqueeze(-1).float()
            found.append(((hidden * mask).sum(1) / mask.sum(1)).cpu())
    return torch.cat(found)


def similarities(first: Tensor, second: Tensor) -> Tensor:
    """Return the (n,) cosine similarity of (n, channels) vectors."""
    return torch.nn.functional.cosine_similarity(first, second)


def class_numbers(labels: list[str], names: dict[str, int] | None) -> Tensor:
    """Return the (n,) int64 classes of labels written as numbers or as names of the model's classes.

    Raises:
        CalibrationError: a label is neither.
    """
    known = {k.lower(): v for k, v in (names or {}).items()}
    for label in labels:
        if not label.lstrip("-").isdigit() and label.lower() not in known:
            some = ", ".join(list(known)[:4]) or "none"
            raise CalibrationError(
                f"the label {label!r} is no class number and no class of the model ({some}, ...); correct the table"
            )
    return torch.tensor([int(x) if x.lstrip("-").isdigit() else known[x.lower()] for x in labels])
