"""Examining GGUF files: sound ones, and each way to break one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llm_fp4.doctor import diagnose
from llm_fp4.errors import CheckpointError
from llm_fp4.export.gguf_blocks import block_bytes
from llm_fp4.export.gguf_model import rotary_rows
from llm_fp4.numerics import PerBlock, max_scale, parse, quantize_tensor, second_scale

gguf = pytest.importorskip("gguf", reason="gguf is optional: pip install 'llm-fp4[gguf]'")
KINDS = {"Q4_0": ("e1m2", 32, "float16"), "MXFP4": ("e2m1", 32, "e8m0"), "NVFP4": ("e2m1", 16, "e4m3")}
PLACES = {"up_proj": "ffn_up", "down_proj": "ffn_down", "gate_proj": "ffn_gate", "q_proj": "attn_q", "k_proj": "attn_k"}
CONFIG = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def write(float_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a GGUF file of some of the model's layers, its blocks passed through ``edit``."""

    def make(kind: str, edit: Callable[[torch.Tensor], torch.Tensor] = lambda t: t, second: float = 1.0) -> Path:
        path = tmp_path / "model.gguf"
        writer: Any = gguf.GGUFWriter(path, "llama")
        fmt, blocks = parse(KINDS[kind][0]), PerBlock(*KINDS[kind][1:])
        for full, tensor in load_file(float_model / "model.safetensors").items():
            name = full.removesuffix(".weight")
            place = PLACES.get(name.rpartition(".")[2])
            if place is None:
                continue
            top = second_scale(tensor.abs().max(), fmt) if kind == "NVFP4" else None
            scale = max_scale(blocks.absmax(tensor), top, fmt, blocks)
            packed = quantize_tensor(tensor, scale, fmt, blocks, second_scale=top)
            data = edit(rotary_rows(block_bytes(packed, kind), name, CONFIG).clone())
            place = f"blk.{name.split('.')[2]}.{place}"
            writer.add_tensor(f"{place}.weight", data.contiguous().numpy(), raw_dtype=gguf.GGMLQuantizationType[kind])
            if top is not None:
                writer.add_tensor(f"{place}.scale", (top**second).reshape(1).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make


SCALES = {"Q4_0": (32, 2), "MXFP4": (32, 1), "NVFP4": (64, 4)}


def neighbours(kind: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a change that puts neighbours into one byte instead of the halves of a block."""
    values, scales = SCALES[kind]

    def edit(data: torch.Tensor) -> torch.Tensor:
        blocks = data.reshape(len(data), -1, scales + values // 2)
        size = 16 if kind == "NVFP4" else 32
        packed = blocks[..., scales:].reshape(len(data), -1, size // 2)
        codes = torch.cat((packed & 0xF, packed >> 4), -1)
        blocks[..., scales:] = (codes[..., 0::2] | (codes[..., 1::2] << 4)).reshape(*blocks.shape[:2], -1)
        return blocks.flatten(1)

    return edit


def halves(kind: str) -> Callable[[torch.Tensor], torch.Tensor]:
    values, scales = SCALES[kind]

    def edit(data: torch.Tensor) -> torch.Tensor:
        blocks = data.reshape(len(data), -1, scales + values // 2)
        blocks[..., scales:] = (blocks[..., scales:] << 4) | (blocks[..., scales:] >> 4)
        return blocks.flatten(1)

    return edit


def scale_bytes(kind: str, *values: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def edit(data: torch.Tensor) -> torch.Tensor:
        data[0, : len(values)] = torch.tensor(values, dtype=torch.uint8)
        return data

    return edit


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_file_gets_a_clean_bill(kind: str, write: Callable[..., Path], float_model: Path) -> None:
    path = write(kind)
    found = diagnose(path)
    assert not found.wrong, found.findings
    assert found.weights == {kind: 10}
    assert found.kind == "GGUF"
    assert not diagnose(path, float_model).wrong  # rows of queries and keys are in llama.cpp's order


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edit", [neighbours, halves])
def test_the_order_of_nibbles(kind: str, edit: Any, write: Callable[..., Path], float_model: Path) -> None:
    path = write(kind, edit(kind))
    (finding,) = (f for f in diagnose(path, float_model).findings if f.wrong)
    assert finding.check == "nibble order"
    assert len(finding.where) == 10
    assert ("neighbours" in finding.seen) == (edit is neighbours)


@pytest.mark.parametrize(
    ("kind", "values", "check"),
    [
        ("Q4_0", (0, 0x7C), "scale infinite"), ("Q4_0", (1, 0x7E), "scale NaN"), ("Q4_0", (0, 0), "scale zero"),
        ("MXFP4", (255,), "scale NaN"), ("NVFP4", (0x7F,), "scale NaN"), ("NVFP4", (0xB8,), "scale negative"), ("NVFP4", (0,), "scale zero"),
    ],
)  # fmt: skip
def test_scales(kind: str, values: tuple[int, ...], check: str, write: Callable[..., Path]) -> None:
    assert [f.check for f in diagnose(write(kind, scale_bytes(kind, *values))).findings if f.wrong] == [check]


def test_a_divisor_beside_nvfp4(write: Callable[..., Path]) -> None:
    assert "global scale inverted" in {f.check for f in diagnose(write("NVFP4", second=-1.0)).findings}


def test_a_damaged_file(write: Callable[..., Path]) -> None:
    path = write("Q4_0")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="cannot be read as GGUF"):
        diagnose(path)
