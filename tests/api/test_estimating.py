"""The estimate before a run: its bytes are those of the checkpoint, and costlier recipes cost more."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_fp4
from llm_fp4.api import estimate
from llm_fp4.recipe import Recipe, load_recipe


@pytest.fixture
def source(tmp_path: Path, tiny_llama: Callable[..., Any]) -> Path:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def stored(folder: Path) -> int:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return int(index["metadata"]["total_size"])


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("minmax-fp", {}), ("minmax-fp", {"embedding": 16}), ("minmax-fp", {"lm_head": 16}), ("minmax-fp", {"weight": 6, "activation": 16}),
        ("nvfp4-rtn", {"embedding": 16, "lm_head": 16}), ("mxfp4-rtn", {}), ("fpq", {"embedding": 8}),
    ],
)  # fmt: skip
def test_bytes_are_those_of_the_checkpoint(tmp_path: Path, source: Path, name: str, bits: dict[str, int]) -> None:
    data = load_recipe(name).model_dump()
    data |= {"bits": bits, "search": {**data["search"], "rounds": 1}}
    if bits.get("weight"):
        data["weights"]["formats"] = None
    wish = Recipe.model_validate(data)
    out = llm_fp4.quantize(source, tmp_path / "out", wish, tokens=torch.arange(2, 130).view(4, 32))
    shifts = 4 * 32 * 4 + 2 * 64 * 2 + 8 * 32  # at most: one byte for each channel of each linear
    difference = estimate(source, wish).bytes - stored(out)
    assert difference == 0 if name != "fpq" else 0 <= difference <= shifts


def test_more_work_costs_more(source: Path) -> None:
    passes = [estimate(source, name).passes for name in ("minmax-fp", "fast", "fpq", "fpq-gptq", "best")]
    assert passes == sorted(passes)
    few = Recipe.model_validate({"calibration": {"sequences": 4}})
    assert 0 < estimate(source, few).seconds < estimate(source, "fpq").seconds
    assert estimate(source, few).memory > 4 * 32 * 260


def test_plan_only_writes_nothing(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from llm_fp4.cli.quantize import quantize

    quantize(str(source), str(tmp_path / "out"), recipe="nvfp4", plan_only=True, as_json=True)
    assert json.loads(capsys.readouterr().out)["bytes"] == estimate(source, "nvfp4").bytes
    quantize(str(source), str(tmp_path / "out"), recipe="best", plan_only=True)
    assert "forward passes over the calibration tokens" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
