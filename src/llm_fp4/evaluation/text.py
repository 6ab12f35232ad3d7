"""Evaluation text as tokens, and WikiText's word-level form undone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from llm_fp4.calibration import documents, token_stream
from llm_fp4.errors import CalibrationError
from llm_fp4.progress import Progress, silent

_LOST = re.compile(r"(?: @[-,.]@)? ?<unk>(?: @[-,.]@(?= ))?")  # no word stands there; as a literal it would be odd subwords
_MARKER = re.compile(r" @[-,.]@ ")

# (pattern, replacement), in order; each works within one line
_RULES = [
    (re.compile(r" \( \)"), ""),  # held such a word alone
    (re.compile(r" @([-,.])@(?: |$)"), r"\1"),  # well @-@ known, 1 @,@ 000, 3 @.@ 5
    (re.compile(r" '(s|S|t|re|ve|ll|d|m)\b"), r"'\1"),  # the lobster 's, don 't
    (re.compile(r" n't\b"), "n't"),
    (re.compile(r"([(\[{]) "), r"\1"),
    (re.compile(r" ([)\]}])"), r"\1"),
    (re.compile(r"([$£€]) (?=\d)"), r"\1"),
    (re.compile(r" ([,.;:!?%])(?=[\s\"')\]},.;:!?]|$)"), r"\1"),
    (re.compile(r"s ' (?=[a-z])"), "s' "),  # the lobsters ' claws
    (re.compile(r" {2,}"), " "),
]


def detokenize_wikitext(text: str) -> str:
    """Return running text for WikiText's word-level form: spacing, `` @-@ ``, quotes and headings undone, ``<unk>`` left out.

    >>> detokenize_wikitext(' = = Size = = \\n It weighs 1 @.@ 5 kg ( 3 lb ) , the " well @-@ known " <unk> one . \\n')
    '== Size ==\\nIt weighs 1.5 kg (3 lb), the "well-known" one.\\n'
    """
    return "\n".join(map(_line, text.split("\n")))


def _line(line: str) -> str:
    line = line.strip(" ")
    if re.fullmatch(r"(= )+.*\S.*( =)+", line):
        line = re.sub(r"= (?==)", "=", line)
    line = _quotes(_LOST.sub("", line))
    for pattern, replacement in _RULES:
        line = pattern.sub(replacement, line)
    return line.strip(" ")


def _quotes(line: str) -> str:
    """Return ``line`` without the blanks inside each pair of quotes, and without the pairs that held a lost word alone."""
    parts = line.split('"')
    for index in range(1, len(parts) - 1, 2):
        quoted = parts[index].strip(" ")
        parts[index] = f'"{quoted}"' if quoted else ""
        if not quoted:
            parts[index - 1] = parts[index - 1].rstrip(" ")
    last = '"' if len(parts) % 2 == 0 else ""  # one without its pair stays
    return "".join(parts[:-1]) + last + parts[-1]


def is_wikitext(text: str) -> bool:
    """Return whether ``text`` is in WikiText's word-level form, which writes a hyphen within a word as `` @-@ ``."""
    return _MARKER.search(text) is not None


def read_tokens(
    source: str | Path, tokenizer: Any, *, tokens: int | None = None, wikitext: bool | None = None, progress: Progress = silent
) -> Tensor:
    """Return the 1-D int64 tokens of an evaluation text, in order: a file or hub data set as in calibration.

    Args:
        tokens: read no more than this many.
        wikitext: whether to undo WikiText's word-level form; by default where its first 64 KiB are in it.
    Raises:
        CalibrationError: missing, unreadable or empty.
    """
    stretches: Iterable[tuple[str, bool]] = documents(source, "evaluation text")
    if wikitext is not False:
        stretches = _plain(stretches, wikitext)
    read = token_stream(stretches, tokenizer, tokens, progress, "read evaluation text")
    if len(read) == 0:
        raise CalibrationError(f"evaluation text {source} is empty; give a text")
    return read


def _plain(stretches: Iterable[tuple[str, bool]], wikitext: bool | None) -> Iterator[tuple[str, bool]]:
    for text, begins in stretches:
        if wikitext is None:
            wikitext = is_wikitext(text)
        yield (detokenize_wikitext(text) if wikitext else text), begins
