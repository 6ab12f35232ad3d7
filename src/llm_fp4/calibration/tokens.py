"""Calibration data as one tensor of tokens, from a text or from the model itself."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_fp4.calibration.self_text import write_text
from llm_fp4.calibration.sources import documents
from llm_fp4.calibration.text import Stretch
from llm_fp4.errors import CalibrationError
from llm_fp4.progress import Progress, silent

MATERIAL = 8  # times the tokens needed are read at most, to draw from
STRETCH = 1 << 16  # characters tokenized at once


def separators(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens put before the first document and those put between two.

    A document ends with EOS where there is one and begins with BOS where the tokenizer itself puts it: a
    token the model has never seen in that place would widen the ranges that calibration measures.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    opens = bos is not None and list(tokenizer("")["input_ids"])[:1] == [bos]
    first = [bos] if opens else []
    if eos is None:
        return first, [] if bos is None else [bos]
    return first, [eos] + [token for token in first if token != eos]


def _cut(text: str) -> Iterable[str]:
    """Yield ``text`` in stretches of at most 64 Ki characters, cut before a blank where there is one."""
    begin = 0
    while len(text) - begin > STRETCH:
        end = begin + STRETCH
        blank = max(text.rfind("\n", begin + 1, end), text.rfind(" ", begin + 1, end))
        end = blank if blank > begin else end
        yield text[begin:end]
        begin = end
    yield text[begin:]


def token_stream(
    stretches: Iterable[Stretch], tokenizer: Any, most: int | None = None, progress: Progress = silent, stage: str = "read text"
) -> Tensor:
    """Return the (n,) int64 tokens of documents in a row; reading stops at ``most`` tokens."""
    first, between = separators(tokenizer)
    kept: list[Tensor] = []
    count = 0
    for document, begins in stretches:
        for part, text in enumerate(_cut(document)):
            tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
            if begins and part == 0 and tokens:
                tokens = (between if count else first) + tokens
            kept.append(torch.tensor(tokens, dtype=torch.int64))
            count += len(tokens)
            if most is not None:
                progress(stage, min(count, most), most)
                if count >= most:
                    return torch.cat(kept)[:most]
    if most is not None:
        progress(stage, most, most)
    return torch.cat(kept) if kept else torch.empty(0, dtype=torch.int64)


def draw_windows(tokens: Tensor, sequences: int, length: int, seed: int) -> Tensor:
    """Return (sequences, length) windows of (n,) ``tokens`` at random positions that do not overlap, in random order.

    Every set of positions is equally likely. ``n`` must be at least ``sequences * length``.
    """
    generator = torch.Generator().manual_seed(seed)
    slack = len(tokens) - sequences * length
    # choose where the gaps go: ``sequences`` of slack + sequences places, in order
    places = torch.randperm(slack + sequences, generator=generator)[:sequences].sort().values
    starts = places - torch.arange(sequences) + torch.arange(sequences) * length
    starts = starts[torch.randperm(sequences, generator=generator)]
    return tokens[starts[:, None] + torch.arange(length)]


def load_tokens(
    source: str | Path, tokenizer: Any, *, sequences: int, length: int, seed: int, model: Any = None, progress: Progress = silent
) -> Tensor:
    """Return the (sequences, length) int64 tokens to calibrate on; the same arguments give the same tokens.

    Args:
        source: "self" (``model`` writes the text), a file (.txt, .jsonl, .json.gz, .parquet, ...) or the name
            of a hub data set, ``name`` or ``name:config``.
        model: the float causal model; needed for "self", otherwise only used to check the tokens against.
    Raises:
        CalibrationError: the source is missing, unreadable, empty or too short, or does not fit the model.
    """
    if sequences < 1 or length < 1:
        raise CalibrationError(f"calibration needs at least one token: --sequences {sequences} --length {length} gives none")
    config = getattr(model, "config", None)
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < length:
        raise CalibrationError(f"the model takes sequences of at most {longest:,} tokens, not {length:,}; set --length {longest}")
    if source == "self":
        if model is None:
            raise CalibrationError("calibration on 'self' needs the float model; give it, or calibrate on a text file")
        return write_text(model, tokenizer, sequences=sequences, length=length, seed=seed, progress=progress)
    need = sequences * length
    tokens = token_stream(documents(source), tokenizer, MATERIAL * need, progress, "read calibration text")
    if len(tokens) == 0:
        raise CalibrationError(f"calibration text {source} is empty; give a text of at least {need:,} tokens")
    if len(tokens) < need:
        fit = f"--sequences {len(tokens) // length}" if len(tokens) >= length else f"--sequences 1 --length {len(tokens)} at most"
        raise CalibrationError(
            f"calibration text {source} holds {len(tokens):,} tokens, but {sequences} sequences of {length} need {need:,}; "
            f"give a longer text, or set {fit}"
        )
    vocabulary = getattr(config, "vocab_size", None)
    if isinstance(vocabulary, int) and int(tokens.max()) >= vocabulary:
        raise CalibrationError(
            f"the tokenizer gives token {int(tokens.max())}, but the model knows only {vocabulary:,}; use the model's own tokenizer"
        )
    return draw_windows(tokens, sequences, length, seed)
