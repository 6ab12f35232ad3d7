"""The estimate before a run: its bytes are those of the checkpoint, and costlier recipes cost more."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_fp4
from llm_fp4.api import benchmark, estimate
from llm_fp4.errors import CalibrationError, OutputError, UnsupportedError
from llm_fp4.models import open_model
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


def test_bytes_hold_learned_maps_and_added_biases(tmp_path: Path, source: Path) -> None:
    data = load_recipe("best").model_dump()
    data["inputs"]["shift"], data["search"] = False, {**data["search"], "compensation": "none", "bias_correction": True}
    wish = Recipe.model_validate(data)
    out = llm_fp4.quantize(source, tmp_path / "out", wish, tokens=torch.arange(2, 130).view(4, 32))
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    mapped = sum("transform" in (module.get("input") or {}) for module in config["modules"].values())
    narrow, wide = 4 * (4**2 + 8**2), 4 * (8**2 + 8**2)  # of 32 channels and of 64
    missing = estimate(source, wish).bytes - stored(out)
    blocks = missing // (6 * narrow + wide)  # that no map made better
    assert missing == blocks * (6 * narrow + wide)
    assert mapped == 7 * (2 - blocks)


def test_a_model_that_writes_its_own_text_is_whole_in_memory(tmp_path: Path, tiny_llama: Callable[..., Any]) -> None:
    tiny_llama(num_hidden_layers=12).save_pretrained(source := tmp_path / "deep")
    text = Recipe.model_validate({"calibration": {"source": "text.txt"}})
    whole = 4 * sum(p.numel() for p in open_model(str(source)).model.parameters())
    assert estimate(source, text).memory < whole <= estimate(source, "fpq").memory


@pytest.mark.parametrize(("device", "words"), [("foo", "unknown device 'foo'"), ("mps", "device mps is not implemented")])
def test_strange_devices_are_refused(source: Path, device: str, words: str) -> None:
    for call in (partial(estimate, source, "fast"), partial(benchmark, source)):
        with pytest.raises(UnsupportedError, match=f"{words}.*use cpu or cuda"):
            call(device=device)


def test_the_cost_is_told_before_the_run(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from llm_fp4.cli.quantize import quantize

    with pytest.raises(CalibrationError):  # no tokenizer: nothing to calibrate on
        quantize(str(source), str(tmp_path / "out"), recipe="fast")
    told = capsys.readouterr()
    assert told.err.startswith("fast 4/4/4: about ")
    assert "forward passes over the calibration tokens" in told.err
    assert told.out == ""


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
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        quantize(str(source), str(tmp_path / "out"), recipe="best", plan_only=True)
