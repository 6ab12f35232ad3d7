"""The shape of what one attention sees of the prefix, a few tokens before every sequence."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from llm_fp4.errors import CheckpointError

PREFIX_TENSORS = ("prefix_key", "prefix_value")


@dataclass(frozen=True)
class PrefixSpec:
    """The structural half, which travels in ``config.json``.

    Attributes:
        tokens: of the prefix. heads: of keys and values. key_size, value_size: channels of a head.
    """

    tokens: int
    heads: int
    key_size: int
    value_size: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the stored float32 tensors: keys, with their positions in them, and values."""
        return {"prefix_key": (self.heads, self.tokens, self.key_size), "prefix_value": (self.heads, self.tokens, self.value_size)}

    def to_json(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PrefixSpec:
        """Return the spec a checkpoint describes.

        Raises:
            CheckpointError: a field is missing, not known or impossible.
        """
        if set(data) != {f.name for f in fields(cls)}:
            raise CheckpointError(f"prefix description has the fields {sorted(data)}; the checkpoint needs a newer llm-fp4")
        if not all(type(v) is int and v >= 1 for v in data.values()):
            raise CheckpointError(f"prefix description has the sizes {data}")
        return cls(**data)
