"""Humming's tensors, read by the rules of its kernels, are our values bit for bit; no GPU was at hand to run it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_fp4.api import export
from llm_fp4.errors import UnsupportedError
from llm_fp4.storage import TensorFiles

SCALES = {"e4m3": (16, "float8e4m3"), "e8m0": (32, "float8e8m0"), "float16": (32, None)}


def dequantized(words: torch.Tensor, exponent_bits: int, mantissa_bits: int) -> torch.Tensor:
    """Return what Humming's dequantizing kernel makes of int32 words: the code's bits as a small float32, times a power of two."""
    codes = torch.stack([(words >> (4 * i)) & 0xF for i in range(8)], -1).flatten(1)
    bits = ((codes >> 3) << 31) | ((codes & 7) << (23 - mantissa_bits))
    # float32 subnormals are kept: in float64 nothing of the product is rounded
    return (bits.view(torch.float32).double() * 2.0 ** (128 - 2 ** (exponent_bits - 1))).float()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ["e1m2", "e2m1", "e3m0"])
def test_weights_are_equal_bit_for_bit(name: str, scale: str, quantized: Callable[..., Path], values: Any, tmp_path: Path) -> None:
    size, stored = SCALES[scale]
    folder = quantized(name, "16/4/16", rules={"granularity": "per_block", "block_size": size, "scale_dtype": scale})
    made = export(folder, tmp_path / "out", "humming")
    assert any("never run on a GPU" in note for note in made.holding.notes)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    described = config["quantization_config"]
    assert (described["dtype"], described["group_size"], described.get("scale_dtype")) == (f"float4{name}", size, stored)
    assert config["dtype"] == ("float16" if scale == "float16" else "bfloat16")
    files, ours = TensorFiles(tmp_path / "out"), values(folder)
    for layer, expected in ours.items():
        if layer == "lm_head":
            assert torch.equal(files.get("lm_head.weight"), expected)
            continue
        value = dequantized(files.get(f"{layer}.weight"), int(name[1]), int(name[3]))
        value *= files.get(f"{layer}.weight_scale").float().repeat_interleave(size, 1)
        if scale == "e4m3":
            assert described["scale_2_type"] == "channel"
            value *= files.get(f"{layer}.weight_scale_2").float()[:, None]
        assert torch.equal(value, expected), layer


FLOAT16 = {"granularity": "per_block", "block_size": 32, "scale_dtype": "float16"}


def test_a_format_a_layer(quantized: Callable[..., Path], tmp_path: Path) -> None:
    other = [{"targets": ["down_proj", "q_proj", "k_proj", "v_proj"], "weight_formats": ["e3m0"]}]
    folder = quantized("e2m1", "16/4/16", rules=FLOAT16, overrides=other)
    export(folder, tmp_path / "out", "humming")
    described = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]

    def dtype(prefix: str) -> str:
        """Return what vLLM finds for a layer by its own, merged name."""
        chosen = dict(described)
        for pattern, own in described["dynamic"].items():
            assert pattern.startswith("+:")
            if re.match(pattern[2:], prefix):
                chosen.update(own)
                break
        return str(chosen["dtype"])

    block = "model.layers.1"
    assert [dtype(f"{block}.self_attn.{n}") for n in ("qkv_proj", "o_proj")] == ["float4e3m0", "float4e2m1"]
    assert [dtype(f"{block}.mlp.{n}") for n in ("gate_up_proj", "down_proj")] == ["float4e2m1", "float4e3m0"]
    ignored = [p for p in described["ignore"] if re.match(p.removeprefix("re:"), "model.embed_tokens")]
    assert len(ignored) == 1


def test_operands_that_vllm_merges_must_agree(quantized: Callable[..., Path], tmp_path: Path) -> None:
    folder = quantized("e2m1", "16/4/16", rules=FLOAT16, overrides=[{"targets": ["k_proj"], "weight_formats": ["e3m0"]}])
    with pytest.raises(UnsupportedError, match=r"q_proj, .*k_proj, .*v_proj in several formats: vLLM merges them"):
        export(folder, tmp_path / "out", "humming")


def test_what_humming_would_round_is_refused(quantized: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedError, match=r"humming cannot hold the E2M1 weights of model.layers.0.* without rounding.*in blocks"
    ):
        export(quantized("e2m1", "16/4/16"), tmp_path / "out", "humming")
    assert not (tmp_path / "out").exists()


def test_without_a_linear_in_codes_there_is_nothing_to_serve(quantized: Callable[..., Path], tmp_path: Path) -> None:
    folder = quantized("e2m1", "4/16/16", rules={"granularity": "per_row"})
    with pytest.raises(UnsupportedError, match="humming has nothing to hold in 4 bits"):
        export(folder, tmp_path / "out", "humming")
