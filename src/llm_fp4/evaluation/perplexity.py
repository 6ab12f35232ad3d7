"""Perplexity, and how far a model's predictions are from those of its float reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llm_fp4.errors import CalibrationError, NonFiniteError, UnsupportedError
from llm_fp4.evaluation.running import device_of, evaluating
from llm_fp4.models import continued
from llm_fp4.progress import Progress, silent

REFERENCE = "float"
CHUNK = 64  # tokens whose softmax is in float64 at once: 25 MB at a vocabulary of 49,152
STAGE = "perplexity"


@dataclass(frozen=True)
class Metrics:
    """What one model's next-token predictions are worth on a text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of the next token.
        kl: mean KL(reference || model) per predicted token, in nats; None without a reference.
        top1: share of predicted tokens whose most likely one is the reference's; None without a reference.
        tokens: how many tokens were predicted.
    """

    perplexity: float
    kl: float | None
    top1: float | None
    tokens: int


def windows(tokens: Tensor, length: int) -> Tensor:
    """Return the (n, length) consecutive windows of 1-D ``tokens``; the remainder is left out.

    Raises:
        CalibrationError: fewer than ``length`` tokens, or a length below 2, which predicts nothing.
    """
    if length < 2:
        raise CalibrationError(f"a window of {length} predicts no token; set a window of at least 2")
    if len(tokens) < length:
        raise CalibrationError(f"evaluation text holds {len(tokens):,} tokens, not one window of {length:,}; give a longer text")
    count = len(tokens) // length
    return tokens[: count * length].view(count, length)


class _Sums:
    """Running float64 sums over predicted tokens."""

    def __init__(self) -> None:
        self.loss = self.divergence = 0.0
        self.agree = self.tokens = 0

    def add(self, logits: Tensor, following: Tensor, reference: Tensor | None) -> None:
        """Add (tokens, vocabulary) ``logits`` that predict (tokens,) ``following``."""
        self.tokens += len(following)
        for begin in range(0, len(following), CHUNK):
            span = slice(begin, begin + CHUNK)
            log_q = torch.log_softmax(logits[span].double(), dim=-1)
            self.loss -= float(log_q.gather(1, following[span].to(log_q.device)[:, None]).sum())
            if reference is not None:
                log_p = torch.log_softmax(reference[span].to(log_q.device).double(), dim=-1)
                self.agree += int((log_q.argmax(-1) == log_p.argmax(-1)).sum())
                self.divergence += float((log_p.exp() * (log_p - log_q)).sum())

    def metrics(self, compared: bool) -> Metrics:
        loss = self.loss / self.tokens
        perplexity = math.exp(loss) if loss < 709 else math.inf  # exp(709) is the last that float64 holds
        # the divergence of nearly equal distributions can round below zero, which no divergence is
        kl = max(0.0, self.divergence / self.tokens)
        return Metrics(perplexity, kl if compared else None, self.agree / self.tokens if compared else None, self.tokens)


class _Run:
    """One model on one window, in pieces; from the second piece on it reads the past from its cache."""

    def __init__(self, model: nn.Module, name: str, place: str, whole: bool) -> None:
        self.model, self.name, self.place, self.whole = model, name, place, whole
        self._cache: Any = None

    def logits(self, piece: Tensor) -> Tensor:
        """Return the (tokens, vocabulary) logits of the next ``piece`` of the window."""
        ids = piece[None].to(device_of(self.model))
        if self.whole:
            found: Tensor = self.model(input_ids=ids, use_cache=False).logits
        else:
            found, self._cache = continued(self.model, ids, self._cache)
        return _finite(found[0], self.name, self.place)


def _finite(logits: Tensor, name: str, place: str) -> Tensor:
    if not bool(torch.isfinite(logits).all()):
        bad = int((~torch.isfinite(logits)).sum())
        raise NonFiniteError(f"model {name!r} gives {bad:,} logits that are NaN or infinite in {place}; run it in float32")
    return logits


def compare(
    reference: nn.Module | None, models: dict[str, nn.Module], windows: Tensor, progress: Progress = silent,
    chunk: int | None = None,
) -> dict[str, Metrics]:  # fmt: skip
    """Return the metrics of the reference, under "float", and of every model, on the same windows.

    Args:
        reference: the float causal model: ``model(input_ids=..., use_cache=False).logits``; None to leave out
            KL divergence and agreement.
        windows: (n, length) int64, each run by itself; only one window's logits of two models are held.
        chunk: run a window in pieces of so many tokens through the model's cache, and hold the logits of one; None: as a whole.
    Raises:
        NonFiniteError: a model gives NaN or infinite logits; the message names it.
        UnsupportedError: a model has another vocabulary than the reference, or is named "float" itself.
    """
    if reference is not None and REFERENCE in models:
        raise UnsupportedError(f"a model cannot be named {REFERENCE!r}, which names the reference; give it another name")
    everyone = ({REFERENCE: reference} if reference is not None else {}) | models
    sums = {name: _Sums() for name in everyone}
    pieces = list(range(0, windows.shape[1] - 1, chunk or windows.shape[1]))
    total, done = len(windows) * len(everyone) * len(pieces), 0
    with evaluating(*everyone.values()):
        for number, window in enumerate(windows, start=1):
            place = f"window {number} of {len(windows)}"
            runs = {name: _Run(model, name, place, chunk is None) for name, model in everyone.items()}
            for begin in pieces:
                # what predicts nothing need not run, but whole windows run whole
                end = len(window) if chunk is None else min(begin + chunk, len(window) - 1)
                following = window[begin + 1 : end + 1]
                expected: Tensor | None = None
                for name, run in runs.items():
                    logits = run.logits(window[begin:end])[: len(following)]
                    if reference is not None and name == REFERENCE:
                        expected = logits
                    if expected is not None and expected.shape != logits.shape:
                        raise UnsupportedError(
                            f"model {name!r} has a vocabulary of {logits.shape[1]:,}, the reference one of {expected.shape[1]:,}; "
                            "compare models of one tokenizer"
                        )
                    sums[name].add(logits, following, expected)
                    done += 1
                    progress(STAGE, done, total)
    return {name: each.metrics(reference is not None) for name, each in sums.items()}
