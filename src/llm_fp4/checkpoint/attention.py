"""The manifest's parts on attention: which modules quantize their products, which hold keys and values in codes, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from llm_fp4.checkpoint.presence import require_tensor
from llm_fp4.errors import CheckpointError, LlmFp4Error
from llm_fp4.numerics import parse
from llm_fp4.plan import AttentionSpec, CacheSpec
from llm_fp4.storage import TensorFiles

Spec = TypeVar("Spec")


def attention_of_plans(plans: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the JSON of all quantized attention modules in the units' plans, by module name."""
    out = {}
    for plan in plans:
        for name, products in plan.get("attention", {}).items():
            if isinstance(products, list):  # otherwise a reason
                inputs = [p[n] for p in products for n in p["operands"]]
                heads = len(inputs[0]["scale"]) if len(inputs[0]["scale"]) > 1 else 0
                first, second, third, fourth = (parse(i["format"]) for i in inputs)
                out[name] = AttentionSpec((first, second, third, fourth), heads).to_json()
    return out


def caches_of_plans(plans: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the JSON of all attention modules with a quantized cache in the units' plans, by module name."""
    fields = CacheSpec.__dataclass_fields__
    decided = {name: entry for plan in plans for name, entry in plan.get("cache", {}).items()}
    return {name: {f: entry[f] for f in fields} for name, entry in decided.items() if "reason" not in entry}


def read_attention(config: dict[str, Any], where: str) -> dict[str, AttentionSpec]:
    """Return the quantized attention modules that a ``quantization_config`` describes.

    Raises:
        CheckpointError: an entry is damaged.
    """
    return _read(config.get("attention"), AttentionSpec.from_json, "attention products", where)


def read_caches(config: dict[str, Any], where: str) -> dict[str, CacheSpec]:
    """Return the attention modules with a quantized cache that a ``quantization_config`` describes.

    Raises:
        CheckpointError: an entry is damaged.
    """
    return _read(config.get("cache"), CacheSpec.from_json, "a cache of keys and values", where)


def _read(entries: Any, parse_entry: Callable[[Any], Spec], what: str, where: str) -> dict[str, Spec]:
    try:
        return {name: parse_entry(entry) for name, entry in (entries or {}).items()}
    except (AttributeError, TypeError, LlmFp4Error) as error:
        raise CheckpointError(f"{where} describes {what} that cannot be read ({error}); the checkpoint is damaged") from None


def verify_children(specs: Mapping[str, AttentionSpec | CacheSpec], files: TensorFiles, child: str) -> None:
    """Raise CheckpointError where a scale of an attention module is missing, or of another shape or type.

    Args:
        child: the name of the module that holds the scales.
    """
    for name, spec in specs.items():
        for own, shape in spec.shapes.items():
            require_tensor(files, f"{name}.{child}.{own}", shape, torch.float32)
