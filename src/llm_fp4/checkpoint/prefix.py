"""The manifest's part on the prefix: which tokens it is made of, and which attention modules see it."""

from __future__ import annotations

from typing import Any

from llm_fp4.errors import CheckpointError, LlmFp4Error
from llm_fp4.plan import PrefixSpec


def prefix_of_plans(plans: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the JSON of all attention modules with a prefix in the units' plans, by module name."""
    return {name: entry for plan in plans for name, entry in plan.get("prefix", {}).items()}


def read_prefix(config: dict[str, Any], where: str) -> dict[str, PrefixSpec]:
    """Return the attention modules with a prefix that a ``quantization_config`` describes.

    Raises:
        CheckpointError: an entry is damaged.
    """
    if "prefix" not in config:
        return {}
    try:
        return {name: PrefixSpec.from_json(entry) for name, entry in config["prefix"]["modules"].items()}
    except (AttributeError, TypeError, KeyError, LlmFp4Error) as error:
        raise CheckpointError(f"{where} describes a prefix that cannot be read ({error}); the checkpoint is damaged") from None
