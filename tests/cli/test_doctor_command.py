"""``llm-fp4 doctor``: what it prints, and its exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def test_a_sound_and_a_broken_checkpoint(llm_fp4: Any, checkpoint: Path) -> None:
    result = llm_fp4("doctor", checkpoint, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["wrong"] is False
    assert sum(said["weights"].values()) == 16
    assert sum(map(sum, said["codes"].values())) > 10_000
    shard = next(checkpoint.glob("model-00002-*.safetensors"))
    tensors = load_file(shard)
    tensors["model.layers.0.mlp.up_proj.weight_scale"][0] = torch.nan
    save_file(tensors, shard)
    result = llm_fp4("doctor", checkpoint, "--quiet")
    assert result.exit_code == 1
    assert "WRONG  scale NaN: model.layers.0.mlp.up_proj: 1 of 64 scales.\n       -> quantize again" in result.stdout
    assert result.stdout.endswith("Something is wrong.\n")


def test_what_is_no_checkpoint(refused: Any, source: Path, tmp_path: Path) -> None:
    assert "has no quantization_config" in refused("doctor", source, "--quiet")
    assert "does not exist" in refused("doctor", tmp_path / "absent", "--quiet")
