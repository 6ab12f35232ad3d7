"""Block formats from recipe to running checkpoint: what is stored, that it runs as searched, and what damage is noticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import llm_fp4
from llm_fp4.checkpoint import verify
from llm_fp4.errors import CheckpointError
from llm_fp4.kernels.simulate import fake_quantize_input
from llm_fp4.nn import QuantEmbedding, QuantLinear
from llm_fp4.numerics import PerBlock
from llm_fp4.recipe import Recipe, load_recipe

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(2, 258, (6, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def source(tmp_path: Path, tiny_llama: Callable[..., Any]) -> Path:
    """A model whose widths (40, 72) are no multiples of the blocks."""
    tiny_llama(tie_word_embeddings=True, hidden_size=40, head_dim=10, intermediate_size=72).save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def test_better_recipes_lose_less(tmp_path: Path, source: Path, tokens: Tensor) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(source)(tokens).logits.detach().log_softmax(-1)
    loss = {}
    for name in ("nvfp4", "nvfp4-rtn", "mxfp4", "mxfp4-rtn"):
        model = llm_fp4.load(llm_fp4.quantize(source, tmp_path / name, name, tokens=tokens))
        loss[name] = (reference.exp() * (reference - model(tokens).logits.log_softmax(-1))).sum(-1).mean().item()
    assert loss["nvfp4"] < loss["nvfp4-rtn"] < loss["mxfp4-rtn"]
    assert loss["nvfp4"] < loss["mxfp4"] < loss["mxfp4-rtn"]


@pytest.mark.parametrize(
    ("name", "blocks", "columns", "dtype"),
    [("nvfp4", PerBlock(16, "e4m3"), 3, torch.float8_e4m3fn), ("mxfp4", PerBlock(32, "e8m0"), 2, torch.uint8)],
)
def test_what_a_checkpoint_holds(
    tmp_path: Path, source: Path, tokens: Tensor, name: str, blocks: PerBlock, columns: int, dtype: torch.dtype
) -> None:
    out = llm_fp4.quantize(source, tmp_path / "out", name, tokens=tokens)
    entry = verify(out)[Q]
    assert entry.blocks == blocks
    assert entry.input is not None
    assert entry.input.blocks == blocks
    stored = load_file(out / "model-00002-of-00004.safetensors")
    assert stored[f"{Q}.weight_packed"].shape == (40, 20)
    assert stored[f"{Q}.weight_scale"].shape == (40, columns)
    assert stored[f"{Q}.weight_scale"].dtype == dtype
    if blocks.two_level:
        second = {n: stored[f"model.layers.0.self_attn.{n}_proj.weight_global_scale"] for n in "qkv"}
        assert second["q"] == second["k"] == second["v"]  # engines fuse them under one scale
        assert torch.frexp(second["q"])[0] == 0.5
    assert "lm_head" not in verify(out)
    for dtype_of_model in (torch.float32, torch.bfloat16):  # codes and scales survive a change of dtype
        layer = llm_fp4.load(out, dtype=dtype_of_model).model.layers[0].self_attn.q_proj
        for suffix in entry.tensors():
            assert torch.equal(getattr(layer, suffix).float(), stored[f"{Q}.{suffix}"].float())
            assert getattr(layer, suffix).dtype == stored[f"{Q}.{suffix}"].dtype
        assert layer(torch.randn(2, 40, dtype=dtype_of_model)).dtype == dtype_of_model


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_a_layer_runs_as_it_was_searched(tmp_path: Path, source: Path, tokens: Tensor, name: str) -> None:
    layer = llm_fp4.load(llm_fp4.quantize(source, tmp_path / "out", name, tokens=tokens)).model.layers[1].mlp.down_proj
    assert isinstance(layer, QuantLinear)
    assert layer.spec is not None
    assert not layer.exact
    x = torch.randn(3, 5, 72)
    rows = fake_quantize_input(x.reshape(15, 72), layer.spec, layer.input_scale, None, None)
    expected = rows.double() @ layer.quantized.dequantize().double().t()
    assert torch.allclose(layer(x).reshape(15, 40).double(), expected, rtol=1e-5, atol=1e-5)


def test_embedding_and_head_part_under_block_scales(tmp_path: Path, source: Path, tokens: Tensor) -> None:
    wish = Recipe.model_validate({**load_recipe("nvfp4").model_dump(), "bits": {}})
    model = llm_fp4.load(llm_fp4.quantize(source, tmp_path / "out", wish, tokens=tokens))
    assert isinstance(model.model.embed_tokens, QuantEmbedding)
    assert model.lm_head.blocks == PerBlock(16, "e4m3")
    assert not model.config.tie_word_embeddings


def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path: Path, source: Path, tokens: Tensor) -> None:
    whole = llm_fp4.quantize(source, tmp_path / "whole", "nvfp4", tokens=tokens)

    def killed(stage: str, done: int, total: int) -> None:
        if stage == "quantize" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm_fp4.quantize(source, tmp_path / "out", "nvfp4", tokens=tokens, progress=killed)
    again = llm_fp4.quantize(source, tmp_path / "out", "nvfp4", tokens=tokens)
    for file in sorted(whole.iterdir()):
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name


def test_damage_is_named(tmp_path: Path, source: Path, tokens: Tensor) -> None:
    out = llm_fp4.quantize(source, tmp_path / "out", "nvfp4", tokens=tokens)
    shard, config = out / "model-00002-of-00004.safetensors", out / "config.json"
    good, text = load_file(shard), config.read_text()

    def refused(match: str, tensors: dict[str, Tensor] | None = None, **fields: Any) -> None:
        data = json.loads(text)
        data["quantization_config"]["modules"][Q] |= fields
        config.write_text(json.dumps(data))
        save_file(good | (tensors or {}), shard, {"format": "pt"})
        with pytest.raises(CheckpointError, match=match):
            llm_fp4.load(out)

    scale = good[f"{Q}.weight_scale"]
    refused(r"q_proj.weight_scale is \(40, 2\)", {f"{Q}.weight_scale": scale[:, :2].contiguous()})
    refused(r"q_proj.weight_scale is torch.float32 .* not torch.float8_e4m3fn", {f"{Q}.weight_scale": scale.float()})
    broken = scale.view(torch.uint8).clone()
    broken[3, 1] = 0x7F  # E4M3's NaN
    refused("q_proj.weight_scale holds NaN", {f"{Q}.weight_scale": broken.view(torch.float8_e4m3fn)})
    refused("q_proj.weight_global_scale holds NaN or infinity", {f"{Q}.weight_global_scale": torch.tensor(torch.inf)})
    refused("unknown granularity 'per_block_16_e5m2'", granularity="per_block_16_e5m2")
    refused("granularity 'per_tensor' of the weight", granularity="per_tensor")
    data = json.loads(text)["quantization_config"]["modules"][Q]["input"]
    refused("unknown granularity 'per_block_x'", input={**data, "granularity": "per_block_x"})
    refused("names no stored scale", input={**data, "granularity": "per_block_16"})
    refused("channel shifts and smoothing of inputs with block scales", input={**data, "max_shift": 3})
