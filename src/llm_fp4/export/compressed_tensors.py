"""compressed-tensors: checkpoints that transformers opens, and vLLM on GPUs.

NVFP4 and MXFP4 blocks become ``nvfp4-pack-quantized`` and ``mxfp4-pack-quantized``, inputs included where they are of the
same blocks; E1M2 becomes ``pack-quantized`` int4; other 4-bit rows keep their levels in FP8 E4M3 (``float-quantized``),
exact in twice the bytes. Embeddings, and heads that share them, are stored as float32 values. Needs no library to write.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from llm_fp4.checkpoint import Manifest, ModuleEntry, read_config
from llm_fp4.export.holding import Holding, hold_weights
from llm_fp4.export.shards import exactly, float_matrices, write_shards
from llm_fp4.export.weights import PackedWeights
from llm_fp4.numerics import QuantizedTensor, decode, parse
from llm_fp4.plan import InputSpec

WHOLE_MODEL = False
NVFP4, MXFP4 = "nvfp4-pack-quantized", "mxfp4-pack-quantized"
INT4, FP8, FLOAT = "pack-quantized", "float-quantized", "float32"
_E2M1, _E1M2 = parse("e2m1"), parse("e1m2")
_BLOCKS = {(16, "e4m3"): NVFP4, (32, "e8m0"): MXFP4}


def _container(entry: ModuleEntry) -> str | None:
    if entry.kind == "embedding" or entry.tied_to is not None:
        return FLOAT
    columns = entry.shape[1]
    if entry.blocks is not None:
        key = (entry.blocks.block_size, entry.blocks.scale_dtype)
        if entry.format == _E2M1 and key in _BLOCKS and columns % key[0] == 0:
            return _BLOCKS[key]
        return INT4 if entry.format == _E1M2 and key[1] == "float16" and columns % key[0] == 0 else None
    if entry.format == _E1M2:
        return INT4
    return FP8 if entry.format.bits == 4 else None


def _holds_input(entry: ModuleEntry, spec: InputSpec) -> bool:
    """Return whether the target quantizes the input as we do: blocks of the weight's own kind."""
    return entry.blocks is not None and spec.blocks == entry.blocks and spec.format == _E2M1 and _container(entry) in (NVFP4, MXFP4)


def hold(manifest: Manifest, weights: PackedWeights) -> Holding:
    """Return what compressed-tensors holds.

    Raises:
        UnsupportedError: weights of other widths or blocks, or smoothed inputs.
    """
    remedy = "use the recipes nvfp4 or mxfp4, or 4 bits with a scale a row"
    holding = hold_weights(manifest, "compressed-tensors", {n: _container(e) for n, e in manifest.items()}, remedy, _holds_input)
    if wide := [n for n, held in holding.containers.items() if held == FP8]:
        holding.notes.append(f"the levels of {len(wide)} weights lie in 8 bits: no 4-bit type here has real scales a row")
    if FLOAT in holding.containers.values():
        holding.notes.append(
            "embeddings, and heads that share them, are float32 values: load with dtype float32 to keep them exact"
        )
    return holding


def write(folder: Path, weights: PackedWeights, out: Path) -> dict[str, Any]:
    """Write the shards and their index into ``out`` and return config.json's content.

    Raises:
        OutputError: the directory cannot be written.
    """
    manifest = weights.manifest

    def exchanged(name: str, suffix: str) -> dict[str, Tensor]:
        if suffix == "weight_packed":
            return _tensors(manifest[name], weights[name])
        if suffix == "input_scale" and _global_input(manifest[name]):
            return {"input_global_scale": (1.0 / weights.files.get(f"{name}.{suffix}")).reshape(1)}
        return {}

    write_shards(weights, out, exchanged)
    config = read_config(folder)
    if any(_container(e) == FLOAT for e in manifest.values()):
        config["dtype"] = "float32"
    return {**config, "quantization_config": _config(manifest, weights)}


def _global_input(entry: ModuleEntry) -> bool:
    return _container(entry) == NVFP4 and entry.input is not None and _holds_input(entry, entry.input)


def _tensors(entry: ModuleEntry, weight: QuantizedTensor) -> dict[str, Tensor]:
    """Return the target's tensors of one weight, by suffix."""
    container = _container(entry)
    if container == FLOAT:
        return {"weight": weight.dequantize()}
    if container in (NVFP4, MXFP4):
        out = {"weight_packed": weight.packed, "weight_scale": weight.scale}  # the very bytes: low nibble the even column
        if weight.second_scale is not None:
            out["weight_global_scale"] = (1.0 / weight.second_scale).reshape(1)  # a divisor there; a power of two here
        return out
    level = decode(weight.codes, weight.format)
    scale = weight.step.reshape(len(level), -1)
    if container == FP8:
        return {"weight": level.to(torch.float8_e4m3fn), "weight_scale": scale}
    return {"weight_packed": int32_words(level), "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}


def int32_words(level: Tensor) -> Tensor:
    """Return (rows, ceil(n / 8)) int32 of (rows, n) levels from -8 to 7: nibbles of ``level + 8``, the first column lowest."""
    nibbles = (pad(level, (0, -level.shape[1] % 8)) + 8).to(torch.int64).reshape(len(level), -1, 8)
    word = (nibbles << (4 * torch.arange(8))).sum(-1)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def _config(manifest: Manifest, weights: PackedWeights) -> dict[str, Any]:
    groups: dict[str, dict[str, Any]] = {}
    for name, entry in manifest.items():
        container = _container(entry)
        if container in (None, FLOAT):
            continue
        scheme = _scheme(str(container), entry)
        groups.setdefault(repr(scheme), {**scheme, "targets": []})["targets"].append(f"re:{exactly(name)}")
    formats = sorted({g["format"] for g in groups.values()})
    ignore = sorted(n for n in {*float_matrices(weights.files), "lm_head"} if n not in manifest or _container(manifest[n]) == FLOAT)
    return {
        "quant_method": "compressed-tensors", "quantization_status": "compressed",
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups.values())}, "ignore": ignore,
    }  # fmt: skip


def _scheme(container: str, entry: ModuleEntry) -> dict[str, Any]:
    kind: dict[str, Any] = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False}
    if container == NVFP4:
        kind |= {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
        inputs = {**kind, "dynamic": "local"}
    elif container == MXFP4:
        kind |= {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
        inputs = {**kind, "dynamic": True}
    else:
        kind |= {"num_bits": 8} if container == FP8 else {"type": "int"}
        kind |= {"strategy": "group", "group_size": entry.blocks.block_size} if entry.blocks else {"strategy": "channel"}
        inputs = {}
    held = inputs and entry.input is not None and _holds_input(entry, entry.input)
    return {"weights": kind, "input_activations": inputs if held else None, "format": container}
