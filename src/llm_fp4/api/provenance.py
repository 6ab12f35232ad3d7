"""Where a checkpoint comes from: digests of the source, the recipe and the calibration data, and the versions that made it.

Digests are of contents, so that the same run gives the same bytes wherever its files lie and whenever it ran.
"""

from __future__ import annotations

import hashlib
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_fp4.models import Batch, FloatModel
from llm_fp4.recipe import Recipe, dump_recipe

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def source_name(opened: FloatModel) -> str | None:
    """Return the source's hub name or the name of its GGUF file; None for a directory, whose name says nothing to others."""
    if opened.gguf is not None:
        return opened.gguf
    return opened.origin if _HUB_NAME.fullmatch(opened.origin) and not Path(opened.origin).exists() else None


def fingerprint(opened: FloatModel, recipe: Recipe, tokens: Tensor | None, batches: list[Batch]) -> dict[str, Any]:
    """Return what a checkpoint was made from, for its manifest.

    Args:
        tokens: calibration tokens, where it was calibrated on them; batches: the model inputs otherwise.
    """
    name = source_name(opened)
    return {
        "source": {**({"name": name} if name else {}), "sha256": _digest_files(source_files(opened))},
        "recipe": {"sha256": hashlib.sha256(dump_recipe(recipe).encode()).hexdigest()},
        "data": {"sha256": digest([{"input_ids": tokens}] if tokens is not None else batches)},
        "versions": {"llm-fp4": own_version(), "torch": torch.__version__, "transformers": version("transformers")},
    }


def digest(batches: list[Batch] | list[dict[str, Tensor]]) -> str:
    """Return the SHA-256 of the names and contents of model inputs."""
    found = hashlib.sha256()
    for batch in batches:
        for name, value in batch.items():
            content = str(value).encode()
            if isinstance(value, Tensor):
                content = value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            found.update(f"{name} ".encode() + content)
    return found.hexdigest()


def own_version() -> str:
    """Return the version of this package as it is installed."""
    try:
        return version("llm-fp4")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "source"


def source_files(opened: FloatModel) -> list[Path]:
    """Return the files the weights come from: the GGUF file, or the shards and config.json."""
    if opened.gguf:
        return [opened.folder / opened.gguf]
    return [*sorted(opened.folder.glob("*.safetensors")), opened.folder / "config.json"]


def _digest_files(files: list[Path]) -> str:
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            whole.update(hashlib.file_digest(handle, "sha256").digest())
    return whole.hexdigest()
