"""Parquet files and hub data sets, without a network."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm_fp4.calibration import documents
from llm_fp4.errors import CalibrationError


def parquet(path: Path, **columns: list[Any]) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is optional")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path)
    return path


def test_parquet_takes_text_or_else_the_first_strings(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", url=["u"] * 1000, text=["one", None, "two", *[""] * 997])
    assert [pair for pair in documents(path) if pair[0]] == [("one", True), ("two", True)]
    path = parquet(tmp_path / "b.parquet", n=[1, 2], body=["one", "two"], other=["x", "y"])
    assert [text for text, _ in documents(path)] == ["one", "two"]


def test_parquet_without_strings_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"no column of strings \(columns: n, m\)"):
        list(documents(parquet(tmp_path / "a.parquet", n=[1], m=[2.0])))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(CalibrationError, match=r"b\.parquet is not a readable Parquet file"):
        list(documents(tmp_path / "b.parquet"))
    whole = parquet(tmp_path / "c.parquet", text=[str(i) * 20 for i in range(5000)]).read_bytes()
    (tmp_path / "c.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CalibrationError, match=r"c\.parquet is not a readable Parquet file"):
        list(documents(tmp_path / "c.parquet"))


@pytest.mark.parametrize(("module", "source"), [("pyarrow", "a.parquet"), ("datasets", "someone/some-set")])
def test_a_missing_library_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, source: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(CalibrationError, match=r"pip install 'llm-fp4\[data\]'"):
        list(documents(source))


def hub(monkeypatch: pytest.MonkeyPatch, records: list[dict[str, Any]] | Exception) -> list[Any]:
    calls: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        calls.append((args, kwargs))
        if isinstance(records, Exception):
            raise records
        return records

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_a_hub_name_with_configuration_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = hub(monkeypatch, [{"text": "one"}, {"text": None}, {"text": "two"}])
    assert list(documents("someone/some-set:en")) == [("one", True), ("two", True)]
    assert calls == [(("someone/some-set", "en"), {"split": "train", "streaming": True})]
    list(documents("some-set"))
    assert calls[1][0] == ("some-set", None)


def test_a_hub_set_that_cannot_be_reached_or_has_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, ConnectionError("cannot reach the hub\nand a long traceback"))
    with pytest.raises(CalibrationError, match=r"some-set' cannot be read \(cannot reach the hub\); check the name .*'self'"):
        list(documents("someone/some-set"))
    hub(monkeypatch, [{"label": 3}])
    with pytest.raises(CalibrationError, match=r"data set 'someone/some-set' has no text field \(fields: label\)"):
        list(documents("someone/some-set"))
