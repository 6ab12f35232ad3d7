"""The manifest's part on the cache: which attention modules hold keys and values in codes, and how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llm_fp4.errors import CheckpointError, LlmFp4Error
from llm_fp4.plan import CacheSpec, PrefixSpec
from llm_fp4.storage import TensorFiles


def caches_of_plans(plans: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the JSON of all attention modules with a quantized cache in the units' plans, by module name."""
    fields = CacheSpec.__dataclass_fields__
    decided = {name: entry for plan in plans for name, entry in plan.get("cache", {}).items()}
    return {name: {f: entry[f] for f in fields} for name, entry in decided.items() if "reason" not in entry}


def read_caches(config: dict[str, Any], where: str) -> dict[str, CacheSpec]:
    """Return the attention modules with a quantized cache that a ``quantization_config`` describes.

    Raises:
        CheckpointError: an entry is damaged.
    """
    entries = config.get("cache") or {}
    try:
        return {name: CacheSpec.from_json(entry) for name, entry in entries.items()}
    except (AttributeError, TypeError, KeyError, LlmFp4Error) as error:
        raise CheckpointError(
            f"{where} describes a cache of keys and values that cannot be read ({error}); the checkpoint is damaged"
        ) from None


def verify_states(specs: Mapping[str, CacheSpec | PrefixSpec], files: TensorFiles, child: str) -> None:
    """Raise CheckpointError where a float32 tensor that attention modules hold by ``specs`` is missing, or of another shape or type.

    Args:
        child: the name of the module inside the attention that holds them.
    """
    for name, spec in specs.items():
        for own, shape in spec.shapes.items():
            full = f"{name}.{child}.{own}"
            if full not in files.where:
                raise CheckpointError(f"{files.folder} lacks the tensor {full}; the checkpoint is incomplete, quantize again")
            if files.shapes[full] != shape or files.dtype(full) != torch.float32:
                raise CheckpointError(
                    f"{full} is {files.shapes[full]} {files.dtype(full)}, the manifest makes it {shape}; the checkpoint is damaged"
                )
