"""Tables of labelled text (TSV or CSV, as GLUE has them): one or two sentences and a label or score a row."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from llm_fp4.errors import CalibrationError

TABLES = (".tsv", ".csv")
FIRST = ("sentence1", "sentence", "text", "premise", "question", "question1", "#1 string")
SECOND = ("sentence2", "hypothesis", "question2", "#2 string")
LABEL = ("label", "score", "gold_label", "quality")


@dataclass(frozen=True)
class Labelled:
    """One row: a sentence, perhaps a second one, and the label as it is written."""

    first: str
    second: str | None
    label: str


def read_labelled(path: str | Path, limit: int | None = None) -> list[Labelled]:
    """Return the rows of a .tsv or .csv file.

    With a header, columns are found by name (sentence1, sentence2, label, ...). Without one, the last column is the label, and
    the others, one or two, are the sentences.

    Raises:
        CalibrationError: missing, not text, empty, or of columns that are not understood.
    """
    file = Path(path)
    if not file.is_file():
        raise CalibrationError(f"{file} does not exist; name a .tsv or .csv file of sentences and labels")
    tab = file.suffix.lower() == ".tsv"
    csv.field_size_limit(1 << 24)
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:  # spreadsheets write a byte order mark
            rows = list(csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE) if tab else csv.reader(stream))
    except (UnicodeDecodeError, csv.Error) as error:
        raise CalibrationError(f"{file} is not a table of text ({error}); save it as UTF-8 with tabs or commas") from None
    rows = [r for r in rows if any(cell.strip() for cell in r)]
    if not rows:
        raise CalibrationError(f"{file} holds no rows")
    header = [cell.strip().lower() for cell in rows[0]]
    label = next((header.index(n) for n in LABEL if n in header), None)
    if label is not None:
        first = next((header.index(n) for n in FIRST if n in header), None)
        if first is None:
            raise CalibrationError(
                f"{file} has the columns {', '.join(header)}, none of them a sentence; name one sentence1 or text"
            )
        second = next((header.index(n) for n in SECOND if n in header), None)
        rows = rows[1:]
    else:
        if len(rows[0]) not in (2, 3):
            raise CalibrationError(
                f"{file} has {len(rows[0])} columns and no header; give it one with sentence1, sentence2 and label"
            )
        first, second, label = 0, 1 if len(rows[0]) == 3 else None, len(rows[0]) - 1
    widest = max(i for i in (first, second, label) if i is not None)
    for number, row in enumerate(rows, 1):
        if len(row) <= widest:
            raise CalibrationError(f"{file} row {number} has {len(row)} columns instead of {widest + 1}; repair or remove it")
    return [Labelled(r[first], None if second is None else r[second], r[label].strip()) for r in rows[:limit]]
