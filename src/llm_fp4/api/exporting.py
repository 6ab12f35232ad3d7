"""Writing a checkpoint in the format of another engine."""

from __future__ import annotations

import importlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from llm_fp4.api.loading import load
from llm_fp4.checkpoint import read_attention, read_caches, read_config, read_prefix, verify
from llm_fp4.errors import OutputError, UnsupportedError
from llm_fp4.export import TARGETS, Holding, PackedWeights
from llm_fp4.models import open_tokenizer
from llm_fp4.progress import Progress, silent
from llm_fp4.storage import output_error, write_json

STAGE = "export"


@dataclass
class Exported:
    """What was written: the directory, what holds each weight, and the bytes of it all."""

    path: Path
    holding: Holding
    bytes: int


def hold(path: str | Path, target: str) -> Holding:
    """Return what ``target`` holds of a checkpoint and what it leaves out; nothing is written.

    Raises:
        UnsupportedError: an unknown target, or weights it cannot hold without rounding them again.
        CheckpointError: the checkpoint is missing or damaged.
    """
    if target not in TARGETS:
        raise UnsupportedError(f"no export target {target!r}; choose {', '.join(sorted(TARGETS))}")
    folder = Path(path)
    manifest = verify(folder)
    if attention := read_attention(read_config(folder)["quantization_config"], str(folder)):
        raise UnsupportedError(
            f"{target} cannot hold quantized attention products ({next(iter(attention))}); quantize again without --attention to export"
        )
    if caches := read_caches(read_config(folder)["quantization_config"], str(folder)):
        raise UnsupportedError(
            f"{target} cannot hold keys and values in codes ({next(iter(caches))}); quantize again without --cache-bits to export"
        )
    if prefix := read_prefix(read_config(folder)["quantization_config"], str(folder)):
        raise UnsupportedError(
            f"{target} cannot hold the prefix that attention sees ({next(iter(prefix))}); quantize again with inputs.sinks per_token to export"
        )
    holding: Holding = importlib.import_module(TARGETS[target]).hold(manifest, PackedWeights(folder, manifest))
    return holding


def export(path: str | Path, out: str | Path, to: str, *, progress: Progress = silent) -> Exported:
    """Write the checkpoint in the directory ``path`` for the engine ``to``, its weights bit for bit.

    Args:
        out: a directory to create.
        to: one of ``llm_fp4.export.TARGETS``: "openvino", "onnx", "compressed-tensors", "gguf" or "humming".
    Raises:
        UnsupportedError: what the target cannot hold, by name; or its library is not installed.
        CheckpointError: the checkpoint is missing or damaged. OutputError: ``out`` exists or cannot be written.
    """
    holding = hold(path, to)
    folder, target = Path(path), Path(out)
    if target.exists():
        raise OutputError(f"{target} exists already; remove it or choose another output")
    exporter = importlib.import_module(TARGETS[to])
    weights = PackedWeights(folder, verify(folder))
    progress(STAGE, 0, 1)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        if exporter.WHOLE_MODEL:
            exporter.write(load(folder, dtype=torch.float32), weights, temporary)
            config = {k: v for k, v in read_config(folder).items() if k != "quantization_config"}
        else:
            config = exporter.write(folder, weights, temporary)
        if config is not None:
            _beside(folder, temporary, config)
        write_json(temporary / "export.json", holding.to_json())
        temporary.rename(target)
    except OSError as error:
        raise output_error(error, target) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    progress(STAGE, 1, 1)
    return Exported(target, holding, sum(p.stat().st_size for p in target.rglob("*") if p.is_file()))


def _beside(folder: Path, out: Path, config: dict[str, object]) -> None:
    """Write the tokenizer, the generation settings and the config beside an exported model."""
    tokenizer = open_tokenizer(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    if (settings := folder / "generation_config.json").is_file():
        shutil.copy(settings, out / settings.name)
    write_json(out / "config.json", config)
