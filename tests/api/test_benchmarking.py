"""The figures of ``bench`` on a tiny model: they follow from each other, and from what is counted by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import llm_fp4
from llm_fp4.api import benchmark
from llm_fp4.cli.main import app
from llm_fp4.kernels.compiled import available
from llm_fp4.recipe import Recipe


@pytest.fixture
def folders(tmp_path: Path, tiny_llama: Any) -> tuple[Path, Path]:
    tiny_llama().save_pretrained(tmp_path / "float")
    tokens = torch.randint(2, 258, (4, 32), generator=torch.Generator().manual_seed(0))
    recipe = Recipe.model_validate({"search": {"rounds": 1}})
    return tmp_path / "float", llm_fp4.quantize(tmp_path / "float", tmp_path / "out", recipe, tokens=tokens)


def test_bytes_and_shares(folders: tuple[Path, Path]) -> None:
    source, checkpoint = folders
    found = benchmark(checkpoint, reference=source, prompt_tokens=8, new_tokens=3, repeats=1)
    ours, wide, narrow = found.models
    assert (wide.name, narrow.name) == ("float32", "bfloat16")
    # 2 blocks of q, o (32 x 32), k, v (16 x 32), gate, up (64 x 32), down (32 x 64); the head (260 x 32)
    linear = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32) + 260 * 32
    norms = 5 * 32
    table = 260 * 32
    rotary = 8
    assert wide.weight_bytes - narrow.weight_bytes == pytest.approx((linear + norms + table) * 2, abs=4 * rotary)
    rows = 2 * (2 * 32 + 2 * 16 + 2 * 64 + 32) + 260
    expected = linear // 2 + 4 * rows
    assert ours.decode is not None
    assert ours.share_of_bandwidth == pytest.approx(expected * ours.decode / 1e9 / found.machine.gigabytes_per_second)
    assert ours.share_of_int8_peak == pytest.approx(2 * (linear - 260 * 32) * ours.prefill / 1e12 / found.machine.int8_teraops)
    assert wide.share_of_int8_peak is None
    assert ours.runs == ("transformers" if available() == ["torch"] else "compiled")
    assert ours.weight_bytes < narrow.weight_bytes


def test_the_command_prints_one_object_or_a_table(folders: tuple[Path, Path]) -> None:
    arguments = ["bench", str(folders[1]), "--prompt-tokens", "4", "--new-tokens", "2", "--repeats", "1", "--quiet"]
    shown = CliRunner().invoke(app, [*arguments, "--json"])
    assert shown.exit_code == 0, shown.output
    data = json.loads(shown.stdout)
    assert data["models"][0]["name"] == str(folders[1])
    assert data["models"][0]["prefill"] > 0
    table = CliRunner().invoke(app, arguments)
    assert "decode tok/s" in table.stdout
    assert "GB/s" in table.stdout


def test_a_missing_model_is_one_sentence(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["bench", str(tmp_path / "none"), "--quiet"])
    assert shown.exit_code == 1
    assert len(shown.stderr.strip().splitlines()) == 1
