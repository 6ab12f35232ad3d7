"""``llm-fp4 export``: what it says before it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

QUICK = ["--sequences", "2", "--length", "32", "--rounds", "1", "--quiet"]


def test_a_dry_run_says_what_is_held_and_left_out(llm_fp4: Any, checkpoint: Path, tmp_path: Path) -> None:
    result = llm_fp4("export", checkpoint, tmp_path / "out", "--to", "openvino", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["target"] == "openvino"
    assert set(said["containers"].values()) <= {"f4e2m1", "i4", "i8"}
    assert len(said["containers"]) == 16
    assert "the input side of 15 layers" in said["dropped"][0]
    assert "with channel shifts" in said["dropped"][0]
    assert f"left out: {said['dropped'][0]}" in result.stderr
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_held_is_refused_by_name(llm_fp4: Any, refused: Any, source: Path, tmp_path: Path) -> None:
    wide, smooth = tmp_path / "wide", tmp_path / "smooth"
    result = llm_fp4("quantize", source, wide, "--recipe", "minmax-fp", "--bits", "16/8/16", *QUICK)
    assert result.exit_code == 0, result.output
    said = refused("export", wide, tmp_path / "out", "--to", "openvino")
    assert "openvino cannot hold the E4M3 weights of model.layers.0.self_attn.q_proj and 14 more" in said
    result = llm_fp4("quantize", source, smooth, "--recipe", "smoothquant", *QUICK)
    assert result.exit_code == 0, result.output
    said = refused("export", smooth, tmp_path / "out", "--to", "onnx")
    assert "input factors of model.layers.0.self_attn.q_proj" in said
    assert not (tmp_path / "out").exists()


def test_bad_places(refused: Any, checkpoint: Path, source: Path, tmp_path: Path) -> None:
    assert "exists already" in refused("export", checkpoint, source, "--to", "openvino", "--quiet")
    assert "is not quantized" in refused("export", source, tmp_path / "out", "--to", "onnx")


@pytest.mark.parametrize(("target", "library"), [("openvino", "openvino"), ("onnx", "onnxscript")])
def test_a_missing_library_is_named(
    target: str, library: str, refused: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, library, None)
    said = refused("export", checkpoint, tmp_path / "out", "--to", target, "--quiet")
    assert f"pip install 'llm-fp4[{target}]'" in said
    assert not list(tmp_path.glob(".out*"))
