"""The manifest's part on attention products: which modules quantize them, and in which formats."""

from __future__ import annotations

from typing import Any

import torch

from llm_fp4.errors import CheckpointError, LlmFp4Error
from llm_fp4.numerics import parse
from llm_fp4.plan import ATTENTION_INPUTS, AttentionSpec
from llm_fp4.storage import TensorFiles


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


def read_attention(config: dict[str, Any], where: str) -> dict[str, AttentionSpec]:
    """Return the quantized attention modules that a ``quantization_config`` describes.

    Raises:
        CheckpointError: an entry is damaged.
    """
    entries = config.get("attention") or {}
    try:
        return {name: AttentionSpec.from_json(entry) for name, entry in entries.items()}
    except (AttributeError, TypeError, LlmFp4Error) as error:
        raise CheckpointError(
            f"{where} describes attention products that cannot be read ({error}); the checkpoint is damaged"
        ) from None


def verify_attention(attention: dict[str, AttentionSpec], files: TensorFiles, child: str) -> None:
    """Raise CheckpointError where a scale of an attention module is missing, or of another shape or type.

    Args:
        child: the name of the module that holds the scales.
    """
    for name, spec in attention.items():
        for own in ATTENTION_INPUTS:
            full = f"{name}.{child}.{own}_scale"
            if full not in files.where:
                raise CheckpointError(f"{files.folder} lacks the tensor {full}; the checkpoint is incomplete, quantize again")
            if files.shapes[full] != spec.scale_shape or files.dtype(full) != torch.float32:
                raise CheckpointError(
                    f"{full} is {files.shapes[full]} {files.dtype(full)}, the manifest makes it {spec.scale_shape}; the checkpoint is damaged"
                )
