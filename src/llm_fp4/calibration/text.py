"""Readers of plain text and JSON lines, streamed: nothing of a large file is read before it is asked for.

Every reader yields ``(text, begins)``: a stretch of text and whether a document begins with it.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from llm_fp4.errors import CalibrationError

Stretch = tuple[str, bool]
CHUNK = 1 << 16  # bytes of plain text read at once
LONGEST_LINE = 1 << 26  # 64 MiB: a longer "line" is not a JSON-lines file


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """Yield a binary stream of ``path``, unpacked where it ends in ``.gz``.

    Raises:
        CalibrationError: the file cannot be opened or read, or its compression is damaged.
    """
    try:
        with cast(IO[bytes], gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")) as stream:
            yield stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CalibrationError(f"{path} is not a complete gzip file ({error}); fetch or compress it again") from error
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror or error}") from error


def read_text(path: Path) -> Iterator[Stretch]:
    """Yield a UTF-8 text file as one document, in stretches of about 64 KiB that end where a line does.

    Raises:
        CalibrationError: unreadable, or not UTF-8; the message names the byte.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    position, first = 0, True
    with open_bytes(path) as stream:
        while True:
            chunk = stream.read(CHUNK)
            chunk += stream.readline(CHUNK) if chunk else b""
            begin = position - len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                where = begin + error.start
                raise CalibrationError(f"{path} is not UTF-8 text (byte {where:,}); save it as UTF-8") from error
            position += len(chunk)
            if text:
                yield (text.removeprefix("\ufeff") if first else text), first
                first = False
            if not chunk:
                return


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield ``(line number, object)`` for each line that is not blank, ``.gz`` or not.

    Raises:
        CalibrationError: unreadable, or a line that is no JSON object; the message names the line.
    """
    with open_bytes(path) as stream:
        number = 0
        while line := stream.readline(LONGEST_LINE):
            number += 1
            if len(line) == LONGEST_LINE:
                raise CalibrationError(f"{path}, line {number} is longer than 64 MiB; write one JSON object a line")
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise CalibrationError(f"{path}, line {number} is not valid JSON ({error}); write one object a line") from error
            if not isinstance(record, dict):
                kind = type(record).__name__
                raise CalibrationError(f"{path}, line {number} is a JSON {kind}, not an object; write one object a line")
            yield number, record


def text_field(record: dict[str, Any], source: str) -> str:
    """Return the field that holds the text: ``text``, else the first that is a string.

    Raises:
        CalibrationError: no field is a string; the message names those there are.
    """
    if isinstance(record.get("text"), str):
        return "text"
    for name, value in record.items():
        if isinstance(value, str):
            return name
    names = ", ".join(map(str, record)) or "none"
    raise CalibrationError(f"{source} has no text field (fields: {names}); name the one with the text 'text'")


def without_surrogates(text: str) -> str:
    """Return ``text`` with lone surrogates, which JSON can spell and UTF-8 cannot hold, replaced by ``?``."""
    return text.encode("utf-8", "replace").decode("utf-8")


def read_json_lines(path: Path) -> Iterator[Stretch]:
    """Yield the text of each JSON object, each a document; the field is chosen by the first (see :func:`text_field`).

    Raises:
        CalibrationError: as :func:`json_lines`, or a line without that field; the message names the line.
    """
    field = None
    for number, record in json_lines(path):
        field = field or text_field(record, f"{path}, line {number}")
        text = record.get(field)
        if not isinstance(text, str):
            raise CalibrationError(f"{path}, line {number} has no string in field {field!r}, which line 1 has; repair that line")
        yield without_surrogates(text), True
