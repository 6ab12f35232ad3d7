"""Damaged, newer and lying checkpoints are refused in one sentence by every command that reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def rejected(refused: Any, text: Path) -> Callable[[Path], str]:
    """Return a function that generates, evaluates and inspects a checkpoint, which must all fail alike."""

    def run(folder: Path, inspect: bool = True) -> str:
        said = {
            refused("generate", folder, "The sea", "--quiet"),
            refused("eval", folder, "--text", text, "--length", "64", "--quiet"),
        }
        if inspect:
            said.add(refused("inspect", folder, "--quiet"))
        assert len(said) == 1
        return said.pop()

    return run


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_module(folder: Path, name: str = UP, **values: Any) -> None:
    edit(folder, lambda c: c["quantization_config"]["modules"][name].update(values))


def edit_tensors(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], shard: str = "model-00002-of-00004.safetensors"
) -> None:
    tensors = load_file(folder / shard)
    change(tensors)
    save_file(tensors, folder / shard, {"format": "pt"})


def test_newer_version(rejected: Any, checkpoint: Path) -> None:
    edit(checkpoint, lambda c: c["quantization_config"].update(version=99))
    sentence = rejected(checkpoint)
    assert "checkpoint version 99" in sentence
    assert "update llm-fp4" in sentence


@pytest.mark.parametrize("shape", [[64, 64], [10**12, 10**12], [32, 64]])
def test_manifest_that_lies_about_a_shape(rejected: Any, checkpoint: Path, shape: list[int]) -> None:
    edit_module(checkpoint, shape=shape)
    sentence = rejected(checkpoint)
    assert f"{UP}.weight_" in sentence
    assert "the manifest makes it" in sentence


@pytest.mark.parametrize(
    "values",
    [{"shape": [-1, 32]}, {"shape": "wide"}, {"kind": "convolution"}, {"weight": "e9m9"}, {"color": "red"}, {"input": {"format": "e2m1", "warp": 1}},
     {"input": {"format": "e2m1", "granularity": "per_planet"}}, {"input": {"format": "e2m1", "max_shift": 4000}}],
)  # fmt: skip
def test_manifest_that_cannot_be_read(rejected: Any, checkpoint: Path, values: dict[str, Any]) -> None:
    edit_module(checkpoint, **values)
    assert f"the manifest entry of {UP} cannot be read" in rejected(checkpoint)


def test_manifest_of_another_model(rejected: Any, checkpoint: Path) -> None:
    def rename(config: dict[str, Any]) -> None:
        modules = config["quantization_config"]["modules"]
        modules["model.layers.7.mlp.up_proj"] = modules.pop(UP)

    edit(checkpoint, rename)
    assert "model.layers.7.mlp.up_proj" in rejected(checkpoint)


@pytest.mark.parametrize("owner", ["nobody", "model.layers.0.mlp.gate_proj"])
def test_manifest_that_shares_what_cannot_be_shared(rejected: Any, checkpoint: Path, owner: str) -> None:
    edit_module(checkpoint, "lm_head", tied_to=owner)
    assert f"lm_head shares the weight of {owner}" in rejected(checkpoint)


def test_no_manifest(rejected: Any, checkpoint: Path) -> None:
    edit(checkpoint, lambda c: c["quantization_config"].pop("modules"))
    assert "lists no quantized modules" in rejected(checkpoint)


def test_missing_tensor(rejected: Any, checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda t: t.pop(f"{UP}.weight_scale"))
    assert f"lacks the tensor {UP}.weight_scale" in rejected(checkpoint)


def test_missing_float_tensor(rejected: Any, checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda t: t.pop("model.layers.0.input_layernorm.weight"))
    assert "model.layers.0.input_layernorm.weight" in rejected(checkpoint, inspect=False)


def test_float_tensor_of_another_shape(rejected: Any, checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda t: t.update({"model.layers.0.input_layernorm.weight": torch.ones(7)}))
    assert "cannot be loaded" in rejected(checkpoint, inspect=False)


def test_tensor_of_another_type(rejected: Any, checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda t: t.update({f"{UP}.weight_packed": t[f"{UP}.weight_packed"].float()}))
    assert f"{UP}.weight_packed is torch.float32" in rejected(checkpoint)


def test_scale_that_is_nan(rejected: Any, checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda t: t[f"{UP}.weight_scale"].fill_(float("nan")))
    assert f"{UP}.weight_scale holds NaN" in rejected(checkpoint, inspect=False)


def test_shift_beyond_the_manifest(rejected: Any, checkpoint: Path) -> None:
    down = "model.layers.0.mlp.down_proj"
    edit_tensors(checkpoint, lambda t: t[f"{down}.input_shift"].fill_(9))
    assert f"{down}.input_shift reaches 9" in rejected(checkpoint, inspect=False)


def test_truncated_shard(rejected: Any, checkpoint: Path) -> None:
    shard = checkpoint / "model-00003-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    sentence = rejected(checkpoint)
    assert shard.name in sentence
    assert "not a complete safetensors file" in sentence


def test_missing_shard(rejected: Any, checkpoint: Path) -> None:
    (checkpoint / "model-00003-of-00004.safetensors").unlink()
    assert "model-00003-of-00004.safetensors is missing" in rejected(checkpoint)


@pytest.mark.parametrize(
    "values", [{"num_hidden_layers": 10**9}, {"hidden_size": 10**12}, {"vocab_size": 10**12}, {"head_dim": 10**12}]
)
def test_hostile_sizes(rejected: Any, checkpoint: Path, values: dict[str, int]) -> None:
    edit(checkpoint, lambda c: c.update(values))
    assert next(iter(values)) in rejected(checkpoint, inspect=False)


def test_more_layers_than_are_stored(rejected: Any, checkpoint: Path) -> None:
    edit(checkpoint, lambda c: c.update(num_hidden_layers=3))
    assert "model.layers.2" in rejected(checkpoint, inspect=False)


def test_architecture_that_is_not_known(rejected: Any, checkpoint: Path) -> None:
    edit(checkpoint, lambda c: c.update(architectures=["AbacusForCausalLM"]))
    assert "AbacusForCausalLM" in rejected(checkpoint, inspect=False)


def test_plan_that_is_no_json(refused: Any, checkpoint: Path) -> None:
    (checkpoint / "plan.json").write_text("{")
    assert "plan.json is not JSON" in refused("inspect", checkpoint, "--quiet")


def test_checkpoint_without_a_plan_still_runs_and_shows_its_manifest(llm_fp4: Any, checkpoint: Path) -> None:
    (checkpoint / "plan.json").unlink()
    assert UP in llm_fp4("inspect", checkpoint, "--quiet").stdout
    assert llm_fp4("generate", checkpoint, "The sea", "--max-new-tokens", "2", "--quiet").exit_code == 0
