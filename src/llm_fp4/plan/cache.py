"""How the keys and values of one attention are held while a decoder writes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from llm_fp4.errors import CheckpointError
from llm_fp4.numerics import FloatFormat, parse

CACHE_TENSORS = ("key_scale", "value_ratio")


@dataclass(frozen=True)
class CacheSpec:
    """The structural half, which travels in ``config.json``.

    Attributes:
        key, value: the formats. heads: of keys and values. key_size, value_size: channels of a head.
        window: the newest tokens that stay in float. sinks: the first tokens that do.
    """

    key: FloatFormat
    value: FloatFormat
    heads: int
    key_size: int
    value_size: int
    window: int
    sinks: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the stored tensors: the step of each key channel; of each head, by what values' largest magnitudes are clipped."""
        return {"key_scale": (self.heads, 1, self.key_size), "value_ratio": (self.heads, 1, 1)}

    def to_json(self) -> dict[str, Any]:
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        return out | {"key": self.key.name, "value": self.value.name}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CacheSpec:
        """Return the spec a checkpoint describes.

        Raises:
            CheckpointError: a field is missing, not known or impossible.
        """
        known = {f.name for f in fields(cls)}
        if set(data) != known:
            raise CheckpointError(f"cache description has the fields {sorted(data)}; the checkpoint needs a newer llm-fp4")
        counts = {n: data[n] for n in ("heads", "key_size", "value_size", "window", "sinks")}
        if not all(isinstance(v, int) and v >= (n not in ("window", "sinks")) for n, v in counts.items()):
            raise CheckpointError(f"cache description has the sizes {counts}")
        return cls(parse(data["key"]), parse(data["value"]), **counts)


@dataclass
class CachePlan:
    """The decision for the keys and values of one attention.

    Attributes:
        key_scale: float32 (heads, 1, key_size), the step of each channel.
        value_ratio: float32 (heads, 1, 1): a token's step is its largest magnitude times this, over the largest level.
        errors: of the scores query · key' and of the outputs probability · value: squared over the squared norm, on the sample.
        clipped: share of the sample's key values beyond the largest value of their channel.
    """

    spec: CacheSpec
    key_scale: Tensor
    value_ratio: Tensor
    errors: tuple[float, float]
    clipped: float

    def to_json(self) -> dict[str, Any]:
        spread = torch.stack((self.key_scale.min(), self.key_scale.median(), self.key_scale.max()))
        return {
            **self.spec.to_json(), "key_scales": spread.tolist(), "value_ratio": self.value_ratio.flatten().tolist(),
            "score_error": self.errors[0], "output_error": self.errors[1], "clipped": self.clipped,
        }  # fmt: skip
