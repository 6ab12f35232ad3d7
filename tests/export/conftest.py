"""Checkpoints of tiny models to export, made once a session for each choice of formats."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_fp4
from llm_fp4.recipe import Recipe


@pytest.fixture
def quantized(tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that quantizes a tiny LLaMA: ``quantized("e2m1", "4/4/4", method="minmax", **config)``."""

    def make(
        formats: str | None, bits: str = "4/4/4", method: str = "minmax", rules: dict[str, Any] | None = None,
        inputs: dict[str, Any] | None = None, overrides: list[dict[str, Any]] | None = None, **config: Any,
    ) -> Path:  # fmt: skip
        key = re.sub(r"\W+", "-", f"{formats} {bits} {method} {rules} {inputs} {overrides} {config}")
        kept = tmp_path_factory.getbasetemp() / "exports" / key
        if not kept.exists():
            source = tmp_path_factory.mktemp("float")
            # wide enough for blocks of 32 in every layer
            tiny_llama(**{"hidden_size": 64, "intermediate_size": 96, **config}).save_pretrained(source)
            tiny_tokenizer.save_pretrained(source)
            embedding, weight, activation = map(int, bits.split("/"))
            recipe = Recipe.model_validate({
                "method": method, "search": {"rounds": 1},
                "bits": {"embedding": embedding, "weight": weight, "activation": activation},
                "weights": {"formats": None if formats is None else formats.split(), **(rules or {})},
                "inputs": inputs or {}, "overrides": overrides or [],
            })  # fmt: skip
            tokens = torch.randint(2, 258, (2, 32), generator=torch.Generator().manual_seed(0))
            kept.parent.mkdir(exist_ok=True)
            llm_fp4.quantize(source, kept, recipe, tokens=tokens)
        return kept

    return make


@pytest.fixture
def values() -> Callable[[Path], dict[str, torch.Tensor]]:
    """Return a function that gives the float32 values of every quantized module of a checkpoint."""

    def read(folder: Path) -> dict[str, torch.Tensor]:
        from llm_fp4.nn import PackedModule

        model = llm_fp4.load(folder)
        return {n: m.quantized.dequantize() for n, m in model.named_modules() if isinstance(m, PackedModule)}

    return read


@pytest.fixture
def weight_only() -> Callable[..., torch.Tensor]:
    """Return a function that gives our logits of a checkpoint with inputs in float: ``weight_only(folder, ids, mask)``."""

    def run(folder: Path, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        from llm_fp4.nn import QuantLinear

        model = llm_fp4.load(folder, dtype=torch.float32)
        for module in model.modules():
            if isinstance(module, QuantLinear):
                module.spec = None
        with torch.no_grad():
            result: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits
        return result

    return run


@pytest.fixture
def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and attention mask of two sequences, one of them padded on the left."""
    ids = torch.arange(3, 37).reshape(2, 17)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids, mask
