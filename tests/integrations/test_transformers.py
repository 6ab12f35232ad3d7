"""transformers opens our checkpoints, whichever package was imported first."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_fp4
from llm_fp4.errors import CheckpointError
from llm_fp4.recipe import Recipe


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_llama: Callable[..., Any]) -> Path:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "float")
    tokens = torch.randint(2, 258, (4, 32), generator=torch.Generator().manual_seed(0))
    return llm_fp4.quantize(tmp_path / "float", tmp_path / "out", Recipe.model_validate({"search": {"rounds": 1}}), tokens=tokens)


@pytest.mark.parametrize(
    "first", ["import llm_fp4, transformers", "import transformers, llm_fp4", "import transformers.quantizers, llm_fp4"]
)
def test_from_pretrained_in_either_order(checkpoint: Path, first: str) -> None:
    program = f"""{first}
model = transformers.AutoModelForCausalLM.from_pretrained({str(checkpoint)!r})
print(type(model.model.layers[1].mlp.down_proj).__name__, type(model.lm_head).__name__)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["QuantLinear", "QuantLinear"]


def test_from_pretrained_is_load(checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.arange(2, 40)[None]
    ours, theirs = llm_fp4.load(checkpoint), AutoModelForCausalLM.from_pretrained(checkpoint)
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_with_cache_and_batches(checkpoint: Path, dtype: torch.dtype) -> None:
    model = llm_fp4.load(checkpoint, dtype=dtype)
    assert model.model.layers[0].self_attn.q_proj.weight_scale.dtype == torch.float32
    assert model(torch.tensor([[5]])).logits.dtype == dtype
    prompts = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    together = model.generate(prompts, max_new_tokens=6, do_sample=False, pad_token_id=1)
    assert together.shape == (2, 10)
    if dtype == torch.float32:  # with and without a cache, alone and in a batch: the same tokens
        uncached = model.generate(prompts, max_new_tokens=6, do_sample=False, use_cache=False, pad_token_id=1)
        assert torch.equal(together, uncached)


def test_saved_again_it_loads_again(checkpoint: Path, tmp_path: Path) -> None:
    model = llm_fp4.load(checkpoint)
    model.save_pretrained(tmp_path / "again")
    ids = torch.arange(2, 40)[None]
    assert torch.equal(llm_fp4.load(tmp_path / "again")(ids).logits, model(ids).logits)


def test_a_missing_float_tensor_is_an_error_not_a_warning(checkpoint: Path) -> None:
    from safetensors.torch import load_file, save_file

    shard = next(checkpoint.glob("model-00002-*.safetensors"))
    tensors = load_file(shard)
    tensors.pop("model.layers.0.input_layernorm.weight")
    save_file(tensors, shard)
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.0\.input_layernorm\.weight|cannot be loaded"):
        llm_fp4.load(checkpoint)


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="only Linux tells which file memory is mapped from")
def test_packed_weights_stay_in_the_mapped_file(checkpoint: Path) -> None:
    model = llm_fp4.load(checkpoint)
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(checkpoint) in line:
            mapped.append([int(end, 16) for end in line.split()[0].split("-")])
    for layer in model.model.layers:
        packed = layer.mlp.gate_proj.weight_packed
        assert any(low <= packed.data_ptr() < high for low, high in mapped)
