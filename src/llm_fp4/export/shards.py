"""Checkpoints shard by shard, quantized weights in another layout: what the targets for vLLM and transformers share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from llm_fp4.checkpoint import STORED
from llm_fp4.export.weights import PackedWeights
from llm_fp4.storage import TensorFiles, write_json, write_tensors


def write_shards(weights: PackedWeights, out: Path, exchanged: Callable[[str, str], dict[str, Tensor]]) -> None:
    """Write the checkpoint's shards into ``out``, one in memory at a time, and their index.

    Args:
        exchanged: returns by suffix what a quantized module's own tensor becomes, given the module and the tensor's suffix
            ("weight_packed", say); nothing where it is left out.
    Raises:
        OutputError: the directory cannot be written.
    """
    files = weights.files
    weight_map: dict[str, str] = {}
    size = 0
    for shard in sorted({p.name for p in files.where.values()}):
        tensors: dict[str, Tensor] = {}
        for full in (n for n, p in files.where.items() if p.name == shard):
            name, _, suffix = full.rpartition(".")
            if name in weights.manifest and suffix in STORED:
                tensors |= {f"{name}.{s}": t for s, t in exchanged(name, suffix).items()}
            else:
                tensors[full] = files.get(full)
        if tensors:
            write_tensors(out / shard, tensors)
            weight_map |= dict.fromkeys(tensors, shard)
            size += sum(t.nbytes for t in tensors.values())
    write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})


def float_matrices(files: TensorFiles) -> set[str]:
    """Return the names of the modules whose matrix the checkpoint holds in float."""
    return {n.removesuffix(".weight") for n, s in files.shapes.items() if n.endswith(".weight") and len(s) == 2}


def exactly(name: str) -> str:
    """Return the regular expression that matches the module's name and no other.

    >>> exactly("layers.0.up")
    '^layers[.]0[.]up$'
    """
    return f"^{name.replace('.', '[.]')}$"
