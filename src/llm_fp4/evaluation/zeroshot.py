"""Zero-shot multiple choice: the answer is the choice the model finds likeliest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_fp4.calibration.text import json_lines
from llm_fp4.errors import CalibrationError, NonFiniteError
from llm_fp4.evaluation.running import device_of, evaluating
from llm_fp4.progress import Progress, silent

STAGE = "zero-shot"
ANSWER = "\nAnswer:"  # what lm-eval's prompts of ARC and PIQA put after the question
BATCH_TOKENS = 1024  # padded tokens run at once


@dataclass(frozen=True)
class Item:
    """One question: what is asked, the answers to choose from, and which of them is right."""

    query: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class ZeroShot:
    """Share of questions answered rightly.

    Attributes:
        acc: the choice of the highest log-likelihood. acc_norm: of the highest per byte of the choice.
        n: questions.
    """

    acc: float
    acc_norm: float
    n: int


def read_items(path: str | Path, limit: int | None = None) -> list[Item]:
    """Return the questions of a JSON-lines file with ``query``, ``choices`` and ``gold``, at most ``limit``.

    Raises:
        CalibrationError: unreadable or empty, or a line that is no such question; the message names the line.
    """
    items: list[Item] = []
    for number, record in json_lines(Path(path)):
        if limit is not None and len(items) >= limit:
            break
        query, choices, gold = record.get("query"), record.get("choices"), record.get("gold")
        place = f"{path}, line {number}"
        if not isinstance(query, str):
            raise CalibrationError(f"{place} has no string 'query'; repair that line")
        if not (isinstance(choices, list) and choices and all(isinstance(choice, str) and choice for choice in choices)):
            raise CalibrationError(f"{place} has no list of non-empty strings 'choices'; repair that line")
        if not (isinstance(gold, int) and 0 <= gold < len(choices)):
            raise CalibrationError(f"{place} has 'gold' {gold!r}, not the number of one of its {len(choices)} choices, from 0")
        items.append(Item(query, tuple(choices), gold))
    if not items:
        raise CalibrationError(f"{path} holds no question; write one JSON object a line with 'query', 'choices' and 'gold'")
    return items


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the tokens of ``context`` and those that ``continuation`` adds to it, the split of lm-eval.

    Blanks that end the context go to the continuation, the whole is encoded, and what the context alone
    takes is cut off. An empty context is BOS, or EOS.
    """
    kept = context.rstrip()
    continuation, context = context[len(kept) :] + continuation, kept
    if not context:
        tokens = list(tokenizer(continuation, add_special_tokens=False)["input_ids"])
        prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return ([prefix], tokens) if prefix is not None and tokens[:1] != [prefix] else (tokens[:1], tokens[1:])
    whole, before = list(tokenizer(context + continuation)["input_ids"]), list(tokenizer(context)["input_ids"])
    return before, whole[len(before) :]


def log_likelihoods(
    model: nn.Module, pairs: Sequence[tuple[list[int], list[int]]], *, batch_tokens: int = BATCH_TOKENS, progress: Progress = silent
) -> list[float]:
    """Return the summed log-likelihood, in nats, of the second of each pair of token lists after the first.

    Sequences of like length run together, padded on the right; over-long ones lose their beginning.

    Raises:
        NonFiniteError: the model gives NaN.
    """
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None) or 1 << 30
    inputs = [(before + after)[:-1][-longest:] for before, after in pairs]
    order = sorted(range(len(pairs)), key=lambda index: -len(inputs[index]))
    scores = [0.0] * len(pairs)
    done = 0
    with evaluating(model):
        while done < len(order):
            width = len(inputs[order[done]])
            rows = order[done : done + max(1, batch_tokens // max(1, width))]
            for index, score in zip(rows, _score([inputs[r] for r in rows], [pairs[r][1] for r in rows], model), strict=True):
                scores[index] = score
            done += len(rows)
            progress(STAGE, done, len(order))
    return scores


def _score(inputs: list[list[int]], targets: list[list[int]], model: nn.Module) -> list[float]:
    """Return the score of each row of one batch; the longest input first."""
    device = device_of(model)
    ids = torch.zeros((len(inputs), len(inputs[0])), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(inputs):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
    logits: Tensor = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    scores = []
    for row, (tokens, target) in enumerate(zip(inputs, targets, strict=True)):
        scored = target[-len(tokens) :]
        at = logits[row, len(tokens) - len(scored) : len(tokens)].double()
        score = float(torch.log_softmax(at, dim=-1).gather(1, torch.tensor(scored, device=device)[:, None]).sum())
        if score != score:
            raise NonFiniteError("the model gives NaN logits on a zero-shot question; run it in float32")
        scores.append(score)
    return scores


def score_choices(
    model: nn.Module, tokenizer: Any, items: Sequence[Item], progress: Progress = silent, *, suffix: str = "",
    batch_tokens: int = BATCH_TOKENS,
) -> ZeroShot:  # fmt: skip
    """Return how many questions the model answers rightly, each choice scored as ``query + suffix + " " + choice``.

    Args:
        suffix: put after the query, whose trailing blanks then go; ``ANSWER`` makes lm-eval's prompts of ARC and PIQA.
    Raises:
        CalibrationError: no items, or a choice of no tokens.
        NonFiniteError: the model gives NaN.
    """
    if not items:
        raise CalibrationError("there is no zero-shot question to score; give at least one")
    pairs = []
    for item in items:
        context = item.query.rstrip() + suffix if suffix else item.query
        for choice in item.choices:
            before, after = encode_pair(tokenizer, context, " " + choice)
            if not before or not after:
                raise CalibrationError(f"choice {choice!r} of question {item.query[:60]!r} has no token to score; repair that item")
            pairs.append((before, after))
    scores = iter(log_likelihoods(model, pairs, batch_tokens=batch_tokens, progress=progress))
    right = right_norm = 0
    for item in items:
        likelihood = [next(scores) for _ in item.choices]
        per_byte = [score / len(choice.encode()) for score, choice in zip(likelihood, item.choices, strict=True)]
        right += likelihood.index(max(likelihood)) == item.gold
        right_norm += per_byte.index(max(per_byte)) == item.gold
    return ZeroShot(right / len(items), right_norm / len(items), len(items))
