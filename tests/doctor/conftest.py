"""Sound checkpoints of a tiny model whose neurons' norms are related as in trained ones, and ways to break them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from breaking import change

import llm_fp4
from llm_fp4.api import export
from llm_fp4.recipe import Recipe

RECIPES = {
    "rows": {"method": "minmax", "weights": {"formats": ["e2m1"]}},
    "nvfp4": {
        "method": "minmax", "bits": {"embedding": 16, "weight": 4, "activation": 4},
        "weights": {"formats": ["e2m1"], "granularity": "per_block", "block_size": 16, "scale_dtype": "e4m3"},
        "inputs": {"formats": ["e2m1"], "granularity": "per_block", "block_size": 16, "scale_dtype": "e4m3", "shift": False},
    },
    "mxfp4": {
        "method": "minmax", "bits": {"embedding": 16, "weight": 4, "activation": 16},
        "weights": {"formats": ["e2m1"], "granularity": "per_block", "block_size": 32, "scale_dtype": "e8m0"},
    },
    "int4": {"method": "minmax", "bits": {"embedding": 16, "weight": 4, "activation": 16}, "weights": {"formats": ["e1m2"]}},
}  # fmt: skip


@pytest.fixture
def float_model(tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of the float model, made once."""
    folder = tmp_path_factory.getbasetemp() / "doctor-float"
    if not folder.exists():
        model = tiny_llama(hidden_size=64, intermediate_size=256)
        draw = torch.Generator().manual_seed(5)
        for block in model.model.layers:
            gain = torch.exp(0.5 * torch.randn(256, generator=draw))
            block.mlp.up_proj.weight.data *= gain[:, None]
            block.mlp.down_proj.weight.data *= gain
        model.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def sound(float_model: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that gives a copy of a sound checkpoint: ``sound("nvfp4", "compressed-tensors")``."""

    def give(kind: str, target: str = "ours") -> Path:
        kept = tmp_path_factory.getbasetemp() / f"doctor-{kind}"
        if not kept.exists():
            recipe = Recipe.model_validate({"search": {"rounds": 1}, "ignore": ["lm_head"], **RECIPES[kind]})
            tokens = torch.randint(2, 258, (2, 32), generator=torch.Generator().manual_seed(0))
            llm_fp4.quantize(float_model, kept, recipe, tokens=tokens)
        if target == "ours":
            return Path(shutil.copytree(kept, tmp_path / "checkpoint"))
        out = export(kept, tmp_path / "exported", "compressed-tensors").path
        if target == "modelopt":
            as_modelopt(out)
        return out

    return give


def as_modelopt(folder: Path) -> None:
    """Turn a directory of compressed-tensors NVFP4 into what ModelOpt writes: other names, factors instead of divisors."""
    names = {
        "weight_packed": "weight",
        "weight_scale": "weight_scale",
        "weight_global_scale": "weight_scale_2",
        "input_global_scale": "input_scale",
    }

    def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out = {}
        for full, tensor in tensors.items():
            name, _, suffix = full.rpartition(".")
            out[f"{name}.{names.get(suffix, suffix)}"] = (1 / tensor).reshape(()) if "global" in suffix else tensor
        return out

    change(folder, renamed)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "exclude_modules": ["lm_head", "model.embed*"],
    }
    (folder / "config.json").write_text(json.dumps(config))
