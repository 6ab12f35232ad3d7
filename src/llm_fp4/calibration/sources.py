"""From the name of a calibration source to its reader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from llm_fp4.calibration.labelled import TABLES
from llm_fp4.calibration.tables import read_hub, read_parquet
from llm_fp4.calibration.text import Stretch, read_json_lines, read_text
from llm_fp4.errors import CalibrationError

READERS: dict[str, Callable[[Path], Iterator[Stretch]]] = {
    ".txt": read_text,
    ".txt.gz": read_text,
    ".jsonl": read_json_lines,
    ".jsonl.gz": read_json_lines,
    ".json": read_json_lines,
    ".json.gz": read_json_lines,
    ".parquet": read_parquet,
}


def check_source(source: str) -> None:
    """Raise CalibrationError where ``source`` names a file that is not there or of no known kind; nothing is read.

    Args:
        source: "self", a file of text or a table, a folder of images or sound, or a hub data set.
    """
    path = Path(source)
    if source == "self" or path.is_dir() or (path.suffix.lower() in TABLES and path.exists()):
        return
    if path.suffix.lower() in TABLES:
        raise CalibrationError(f"calibration source {source} does not exist; check the path")
    documents(source)


def documents(source: str | Path, what: str = "calibration source") -> Iterator[Stretch]:
    """Return ``(text, begins)`` stretches of a file, known by its ending, or else of a hub data set.

    Args:
        what: the text is, for messages.
    Raises:
        CalibrationError: a missing file, a directory or an unknown ending; while iterating, unreadable content.
    """
    path, name = Path(source), str(source)
    reader = next((reader for ending, reader in READERS.items() if path.name.lower().endswith(ending)), None)
    if path.is_dir():
        raise CalibrationError(f"{what} {name} is a directory; name one file in it ({', '.join(READERS)})")
    if path.exists():
        if reader is None:
            raise CalibrationError(f"{name} has an ending that is not known; use one of {', '.join(READERS)}")
        return reader(path)
    looks_like_path = reader is not None or path.is_absolute() or name.startswith(".") or name.count("/") > 1
    if looks_like_path:
        raise CalibrationError(f"{what} {name} does not exist; check the path")
    if not name.strip():
        raise CalibrationError(f"{what} is empty; name a file, a hub data set or 'self'")
    return read_hub(name)
