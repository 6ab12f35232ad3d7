"""``--cache-bits`` and ``eval --context`` from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

QUICK = ["--sequences", "2", "--length", "64", "--rounds", "1", "--quiet"]


def test_a_cache_in_codes_is_made_shown_used_and_measured(llm_fp4: Any, source: Path, tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    wish = llm_fp4("inspect", source, "--cache-bits", "4", "--quiet")
    assert "every causal attention" in wish.stdout
    result = llm_fp4("quantize", source, out, "--cache-bits", "4", *QUICK)
    assert result.exit_code == 0, result.output
    shown = llm_fp4("inspect", out, "--quiet").stdout
    assert "newest float" in shown
    assert "model.layers.1.self_attn" in shown
    inspected = json.loads(llm_fp4("inspect", out, "--json").stdout)["cache"]
    assert [c["window"] for c in inspected] == [64, 64]
    # 8 channels a head: two values of 16 bytes each in float16, 4 bytes of codes each and a step of 2
    assert inspected[0]["ratio"] == pytest.approx(32 / 10)
    written = llm_fp4("generate", out, "The sea is wide. " * 10, "--max-new-tokens", "8", "--json", "--quiet")
    assert written.exit_code == 0, written.output
    asked = ["eval", out, "--text", text, "--context", "128,32", "--reference", source, "--windows", "2", "--quiet"]
    found = json.loads(llm_fp4(*asked, "--json").stdout)["context"]
    assert list(found) == ["32", "128"]
    assert found["32"]["model"]["tokens"] == 8 * 31
    assert found["128"]["model"]["tokens"] == 2 * 127
    assert found["128"]["gap"] != 0
    table = llm_fp4(*asked, "--chunk", "16").stdout
    assert "context" in table
    assert "254" in table


def test_lengths_that_cannot_be_are_refused(llm_fp4: Any, refused: Any, checkpoint: Path, text: Path) -> None:
    for wrong in ("many", "512,1", "512,,1024"):
        result = llm_fp4("eval", checkpoint, "--text", text, "--context", wrong, "--quiet")
        assert result.exit_code == 2
        assert "is no list of lengths" in result.stderr
    result = llm_fp4("eval", checkpoint, "--table", text, "--context", "64", "--quiet")
    assert result.exit_code == 2
    assert "--context measures perplexity" in result.stderr
    assert "takes at most 256 tokens" in refused("eval", checkpoint, "--text", text, "--context", "64,512", "--quiet")


def test_widths_that_cannot_be_are_refused(refused: Any, source: Path, tmp_path: Path) -> None:
    sentence = refused("quantize", source, tmp_path / "out", "--cache-bits", "2", "--quiet", code=2)
    assert "cache.bits: 2 bits is not possible" in sentence
