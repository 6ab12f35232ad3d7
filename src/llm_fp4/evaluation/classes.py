"""Image classification: how often the right class is the first, or among the first five, of a model's answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_fp4.errors import CalibrationError, NonFiniteError
from llm_fp4.evaluation.running import evaluating


@dataclass(frozen=True)
class TopK:
    """Shares of ``n`` images.

    Attributes:
        top1, top5: the label is the first, or among the five most likely classes.
        agreement: the first class is the reference's; None without one.
    """

    top1: float
    top5: float
    agreement: float | None
    n: int


def class_logits(model: Any, batches: Iterable[dict[str, Tensor]], name: str) -> Tensor:
    """Return the (n, classes) float32 logits of all batches.

    Raises:
        CalibrationError: the model gives no logits of classes. NonFiniteError: they hold NaN or infinity.
    """
    found = []
    with evaluating(model):
        for batch in batches:
            logits = getattr(model(**batch), "logits", None)
            if logits is None or logits.dim() != 2:
                raise CalibrationError(f"{name} gives no class for an input; use a model with a classification head")
            found.append(logits.float().cpu())
    logits = torch.cat(found)
    if not bool(torch.isfinite(logits).all()):
        raise NonFiniteError(f"{name} gives NaN or infinite logits; load it in float32 or quantize again")
    return logits


def top_k(logits: Tensor, labels: Tensor, reference: Tensor | None = None) -> TopK:
    """Return the shares for (n, classes) logits and (n,) int64 labels; ``reference``: (n, classes) of the float model."""
    first = logits.topk(min(5, logits.shape[1]), 1).indices
    agreement = None if reference is None else float((first[:, 0] == reference.argmax(1)).float().mean())
    right = first == labels.unsqueeze(1)
    return TopK(float(right[:, 0].float().mean()), float(right.any(1).float().mean()), agreement, len(labels))
