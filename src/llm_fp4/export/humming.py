"""Humming: checkpoints that vLLM serves by its any-float weight kernels, on recent NVIDIA GPUs and without a plugin.

Written from humming-kernels 0.1.19 and vLLM 0.32's ``quant_method: "humming"``; not run, for want of such a GPU. A weight is int32
words of eight codes, the lowest first, each a sign, an exponent and a mantissa in the unit of our block scales; scales are
those of blocks (E4M3, E8M0 or float16), and over E4M3 one for every row, here all alike. Real scales a row would be rounded
to 16 bits there, and are refused.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_fp4.checkpoint import Manifest, ModuleEntry, read_config
from llm_fp4.errors import UnsupportedError
from llm_fp4.export.holding import Holding, hold_weights
from llm_fp4.export.shards import exactly, float_matrices, write_shards
from llm_fp4.export.weights import PackedWeights
from llm_fp4.numerics import QuantizedTensor, scale_bytes

WHOLE_MODEL = False
FLOAT = "float32"
_SCALES = {"e4m3": "float8e4m3", "e8m0": "float8e8m0", "float16": None}  # None: the type that the model is served in
_MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}  # as vLLM builds them
_REMEDY = "quantize to 4 bits in blocks of 16 or more with scale_dtype e4m3, e8m0 or float16"


def _container(entry: ModuleEntry, name: str = "") -> str | None:
    if entry.kind == "embedding" or entry.tied_to is not None or name.endswith("lm_head"):
        return FLOAT  # vLLM leaves heads in float under this method
    blocks = entry.blocks
    if (
        entry.format.bits != 4
        or blocks is None
        or blocks.block_size < 16
        or entry.shape[1] % blocks.block_size
        or entry.shape[1] % 32
    ):
        return None
    return f"float4{entry.format.name}" if blocks.scale_dtype in _SCALES else None


def hold(manifest: Manifest, weights: PackedWeights) -> Holding:
    """Return what Humming holds.

    Raises:
        UnsupportedError: weights of other widths or without blocks, operands that vLLM merges and that differ, smoothed inputs, or no
            linear in 4 bits.
    """
    holding = hold_weights(manifest, "humming", {n: _container(e, n) for n, e in manifest.items()}, _REMEDY)
    if not _schemes(manifest, holding.containers, float_matrices(weights.files)):
        raise UnsupportedError(f"humming has nothing to hold in 4 bits: no linear but the head is quantized; {_REMEDY}")
    holding.notes.append("written from the engine's own code, never run on a GPU: compare its predictions before relying on it")
    kinds = {e.blocks.scale_dtype for e in manifest.values() if e.blocks is not None}
    holding.notes.append(f"serve it with --dtype {_dtype(kinds)}; products there are of 16-bit inputs")
    if FLOAT in holding.containers.values():
        holding.notes.append("embeddings and heads are float32 values, which vLLM rounds to the type it serves in")
    return holding


def write(folder: Path, weights: PackedWeights, out: Path) -> dict[str, Any]:
    """Write the shards and their index into ``out`` and return config.json's content.

    Raises:
        OutputError: the directory cannot be written.
    """
    manifest = weights.manifest

    def exchanged(name: str, suffix: str) -> dict[str, Tensor]:
        return words_and_scales(manifest[name], weights[name], name) if suffix == "weight_packed" else {}

    write_shards(weights, out, exchanged)
    heads = {n: e.tied_to for n, e in manifest.items() if e.tied_to is not None}
    config = read_config(folder)
    if heads:
        config["tie_word_embeddings"] = True  # the head reads the embedding's values
    config["dtype"] = _dtype({e.blocks.scale_dtype for e in manifest.values() if e.blocks is not None})
    containers = {n: str(_container(e, n)) for n, e in manifest.items()}
    return {**config, "quantization_config": _config(manifest, containers, float_matrices(weights.files))}


def words_and_scales(entry: ModuleEntry, weight: QuantizedTensor, name: str = "") -> dict[str, Tensor]:
    """Return the target's tensors of one weight, by suffix: ``weight``, ``weight_scale`` and ``weight_scale_2``."""
    if _container(entry, name) == FLOAT:
        return {"weight": weight.dequantize()}
    assert entry.blocks is not None
    stored = weight.scale
    if entry.blocks.scale_dtype == "e8m0":
        stored = scale_bytes(stored).view(torch.float8_e8m0fnu)
    out = {"weight": weight.packed.contiguous().view(torch.int32), "weight_scale": stored}  # little-endian words of the very bytes
    if weight.second_scale is not None:  # a power of two, which bfloat16 holds; one a row, so that merged operands keep their own
        out["weight_scale_2"] = weight.second_scale.to(torch.bfloat16).expand(len(stored)).contiguous()
    return out


def _dtype(kinds: set[str]) -> str:
    return "float16" if "float16" in kinds else "bfloat16"


def _scheme(entry: ModuleEntry) -> dict[str, Any]:
    assert entry.blocks is not None
    scale = _SCALES[entry.blocks.scale_dtype]
    return {
        "dtype": f"float4{entry.format.name}", "group_size": entry.blocks.block_size, "scale_type": "group",
        **({"scale_dtype": scale} if scale else {}), **({"scale_2_type": "channel"} if entry.blocks.two_level else {}),
    }  # fmt: skip


def _schemes(manifest: Manifest, containers: dict[str, str], listed: set[str]) -> dict[str, dict[str, Any]]:
    """Return the scheme of every layer by the name that vLLM gives it, operands merged.

    Raises:
        UnsupportedError: merged operands that differ, or of which only some are quantized.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, entry in manifest.items():
        if containers[name] == FLOAT:
            continue
        parent, _, last = name.rpartition(".")
        merged = next((m for m, parts in _MERGED.items() if last in parts), last)
        scheme = _scheme(entry)
        operands = [f"{parent}.{o}" for o in _MERGED.get(merged, (last,))]
        if kept := next((o for o in operands if o in listed), None):
            raise UnsupportedError(f"humming cannot hold {kept} in float beside {name}: vLLM merges them; quantize or ignore both")
        place = f"{parent}.{merged}" if parent else merged
        if found.setdefault(place, scheme) != scheme:
            raise UnsupportedError(
                f"humming cannot hold {', '.join(operands)} in several formats: vLLM merges them; give them one format"
            )
    return found


def _config(manifest: Manifest, containers: dict[str, str], listed: set[str]) -> dict[str, Any]:
    schemes = _schemes(manifest, containers, listed)
    (usual, _), *_ = Counter(repr(s) for s in schemes.values()).most_common()
    base = next(s for s in schemes.values() if repr(s) == usual)
    overrides = {f"+:{exactly(n)}": {**dict.fromkeys(base), **s} for n, s in schemes.items() if s != base}
    floats = sorted(n for n in {*listed, *(n for n, held in containers.items() if held == FLOAT)})
    return {"quant_method": "humming", **base, "dynamic": overrides, "ignore": [f"re:{exactly(n)}" for n in floats]}
