"""Readers of text and JSON lines, and what hostile files do to them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from llm_fp4.calibration import documents
from llm_fp4.calibration.text import CHUNK, LONGEST_LINE
from llm_fp4.errors import CalibrationError


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_text_file_is_one_document_in_stretches_that_end_with_lines(tmp_path: Path) -> None:
    text = "".join(f"line {i}: é€😀\n" for i in range(20_000))
    read = list(documents(write(tmp_path / "a.txt", text)))
    assert "".join(part for part, _ in read) == text
    assert len(read) > 1
    assert [begins for _, begins in read] == [True] + [False] * (len(read) - 1)
    assert all(part.endswith("\n") for part, _ in read)


def test_characters_survive_the_cut_of_a_text_without_lines(tmp_path: Path) -> None:
    text = "x" + "😀" * CHUNK  # four bytes each, none at a multiple of the chunk
    assert "".join(part for part, _ in documents(write(tmp_path / "a.txt", text))) == text


def test_the_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert list(documents(write(tmp_path / "a.txt", b"\xef\xbb\xbfhello"))) == [("hello", True)]


@pytest.mark.parametrize("before", [0, 10, 3 * CHUNK + 7])
def test_undecodable_text_names_the_byte(tmp_path: Path, before: int) -> None:
    path = write(tmp_path / "a.txt", b"a" * before + b"\xff\xfe")
    with pytest.raises(CalibrationError, match=rf"a\.txt is not UTF-8 text \(byte {before:,}\); save it as UTF-8"):
        list(documents(path))


def test_a_character_cut_off_by_the_end_is_undecodable(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"byte 3"):
        list(documents(write(tmp_path / "a.txt", b"abc\xf0\x9f")))


def test_a_text_file_is_read_no_further_than_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"fine\n" * CHUNK + b"\xff")
    assert next(iter(documents(path)))[0].startswith("fine")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "A.JSONL", "a.json.gz", "a.jsonl.gz"])
def test_json_lines_give_a_document_each(tmp_path: Path, name: str) -> None:
    lines = b'{"url": "u", "text": "one"}\n\n{"text": "two", "more": 1}\n'
    path = write(tmp_path / name, gzip.compress(lines) if name.endswith("gz") else lines)
    assert list(documents(path)) == [("one", True), ("two", True)]


def test_compressed_text(tmp_path: Path) -> None:
    assert list(documents(write(tmp_path / "a.txt.gz", gzip.compress(b"hello")))) == [("hello", True)]


def test_without_a_field_text_the_first_string_is_taken(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"id": 1, "content": "one", "url": "x"}\n{"url": "y", "content": "two"}\n')
    assert [text for text, _ in documents(path)] == ["one", "two"]


def test_a_lone_surrogate_becomes_something_a_tokenizer_takes(tmp_path: Path) -> None:
    [(text, _)] = documents(write(tmp_path / "a.jsonl", r'{"text": "a\ud800b"}'))
    assert text == "a?b"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": \n', r"line 2 is not valid JSON"),
        ('{"text": "a"}\n\n[1, 2]\n', r"line 3 is a JSON list, not an object"),
        ('{"n": 1, "m": null}\n', r"line 1 has no text field \(fields: n, m\)"),
        ("{}\n", r"no text field \(fields: none\)"),
        ('{"text": "a"}\n{"text": null}\n', r"line 2 has no string in field 'text'"),
        (b'{"text": "\xff"}\n', r"line 1 is not valid JSON"),
        ("[" * 100_000, r"line 1 is not valid JSON"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, content: bytes | str, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        list(documents(write(tmp_path / "a.jsonl", content)))


def test_a_line_without_end_is_refused_and_not_held(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as stream:
        stream.truncate(LONGEST_LINE + 10)  # sparse
    with pytest.raises(CalibrationError, match=r"line 1 is longer than 64 MiB"):
        list(documents(path))


@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_a_damaged_gzip_file(tmp_path: Path, damage: str) -> None:
    whole = gzip.compress("\n".join(json.dumps({"text": str(i) * 50}) for i in range(2000)).encode())
    path = write(tmp_path / "a.json.gz", whole[: len(whole) // 2] if damage == "truncated" else b"not gzip at all")
    with pytest.raises(CalibrationError, match=r"a\.json\.gz is not a complete gzip file"):
        list(documents(path))


@pytest.mark.parametrize("name", ["absent.txt", "no/such/dir/absent", "./absent", "/absent"])
def test_a_missing_file(name: str) -> None:
    with pytest.raises(CalibrationError, match=r"absent.* does not exist"):
        documents(name)


def test_a_directory_and_an_unknown_ending(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"is a directory; name one file in it \(\.txt"):
        documents(tmp_path)
    with pytest.raises(CalibrationError, match=r"ending that is not known; use one of \.txt"):
        documents(write(tmp_path / "a.docx", "x"))
    with pytest.raises(CalibrationError, match="source is empty"):
        documents(" ")
