"""What the search decided: one InputPlan for each input site, one WeightPlan for each weight.

An *input site* is a tensor quantized once and read by all its operands (q/k/v; gate/up). The structural
half of a plan (formats, granularity, shift range) is an :class:`InputSpec` and travels in ``config.json``;
scales and shifts travel as tensors; errors and reasons stay in ``plan.json`` for people.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llm_fp4.errors import CheckpointError, UnsupportedError
from llm_fp4.numerics import FloatFormat, parse

LIMB = 127  # the largest magnitude of one signed int8 limb
TWO_LIMBS = 16383  # high * 128 + low with low in 0..127 and high in -128..127


@dataclass(frozen=True)
class InputSpec:
    """How an input is quantized, without the numbers.

    Attributes:
        granularity: "per_tensor" (static scale) or "per_token" (the scale of each row is its largest
            shifted magnitude times the stored ratio, over the largest level).
        max_shift: the largest channel shift, 0 where there is none.
        smooth: whether a real factor per channel divides the input first (SmoothQuant).
    """

    format: FloatFormat
    granularity: str = "per_tensor"
    max_shift: int = 0
    smooth: bool = False
    offset: bool = False
    transform: str | None = None

    def __post_init__(self) -> None:
        if self.granularity not in ("per_tensor", "per_token"):
            raise UnsupportedError(f"input granularity {self.granularity!r} is not implemented; use per_tensor or per_token")
        if self.offset:
            raise UnsupportedError("input offset is not implemented in this version; leave it out of the plan")
        if self.transform is not None:
            raise UnsupportedError(f"input transform {self.transform!r} is not implemented; leave it out of the plan")
        if not 0 <= self.max_shift <= 127:
            raise UnsupportedError(f"input max_shift {self.max_shift} is outside 0 to 127")

    @property
    def top(self) -> int:
        """The largest integer the quantized input reaches, in steps of its most shifted channel."""
        return self.format.max_level << self.max_shift

    @property
    def limbs(self) -> int:
        """How many int8 limbs hold the shifted levels; 0 where two do not suffice and the product is in float."""
        return 1 if self.top <= LIMB else 2 if self.top <= TWO_LIMBS else 0

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {"format": self.format.name, "granularity": self.granularity, "max_shift": self.max_shift}
        return out | ({"smooth": True} if self.smooth else {})

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> InputSpec:
        """Return the spec a checkpoint describes.

        Raises:
            CheckpointError: a field this version does not know.
            UnsupportedError: a known field with a value that is not implemented.
        """
        known = {"format", "granularity", "max_shift", "smooth", "offset", "transform"}
        if unknown := sorted(set(data) - known):
            raise CheckpointError(f"input description has unknown fields {unknown}; the checkpoint needs a newer llm-fp4")
        return cls(**{**data, "format": parse(data["format"])})


@dataclass
class InputPlan:
    """The decision for one input site.

    Attributes:
        name: the site: its first operand's module name.
        operands: module names of every linear that reads the input.
        scale: float32 (), the step of the least shifted channel; for per-token, the clipping ratio.
        shift: (in,) uint8 k with ``step_j = scale * 2**-k_j``, or None.
        smooth: (in,) float32 that divides the input, or None.
        error: squared output error over the output's squared norm, calibration tokens, all operands.
    """

    name: str
    operands: list[str]
    spec: InputSpec
    scale: Tensor
    shift: Tensor | None = None
    smooth: Tensor | None = None
    error: float | None = None
    sink_ratio: float | None = None
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        histogram = None
        if self.shift is not None:
            histogram = torch.bincount(self.shift.long(), minlength=self.spec.max_shift + 1).tolist()
        return {
            "operands": self.operands, **self.spec.to_json(), "scale": float(self.scale), "shift_histogram": histogram,
            "error": self.error, "sink_ratio": self.sink_ratio, "reason": self.reason,
        }  # fmt: skip


@dataclass
class WeightPlan:
    """The decision for one weight: format and scales; ``error`` is that of its own output, relative."""

    name: str
    format: FloatFormat
    scale: Tensor  # (out,) float32
    error: float | None = None

    def to_json(self) -> dict[str, Any]:
        s = self.scale
        return {"format": self.format.name, "scale_min": float(s.min()), "scale_max": float(s.max()), "error": self.error}


@dataclass
class FixedWeight:
    """A weight decided before its site is searched (a head that shares its embedding's codes)."""

    plan: WeightPlan
    values: Tensor  # (out, in) float32, as stored


@dataclass
class SiteResult:
    """What the search returns for one site.

    Attributes:
        input: None in weight-only recipes.
        rounded: (out, in) values on the grid of weights that are not simply rounded to nearest (error compensation).
    """

    input: InputPlan | None
    weights: dict[str, WeightPlan]
    rounded: dict[str, Tensor] = field(default_factory=dict)


ATTENTION_INPUTS = ("query", "key", "probability", "value")
"""The inputs of an attention's two products: query · key' and probability · value."""


@dataclass(frozen=True)
class AttentionSpec:
    """How the inputs of an attention's products are quantized, without the numbers.

    Attributes:
        formats: of query, key, probability and value, in that order.
        heads: 0 for one scale a tensor, else the number of heads, each with its own scale.
    """

    formats: tuple[FloatFormat, FloatFormat, FloatFormat, FloatFormat]
    heads: int = 0

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """The shape of each input's scale."""
        return (self.heads, 1, 1) if self.heads else ()

    def to_json(self) -> dict[str, Any]:
        return {**{n: f.name for n, f in zip(ATTENTION_INPUTS, self.formats, strict=True)}, "heads": self.heads}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> AttentionSpec:
        """Return the spec a checkpoint describes.

        Raises:
            CheckpointError: a field is missing or not known.
        """
        if set(data) != {*ATTENTION_INPUTS, "heads"} or not isinstance(data["heads"], int) or data["heads"] < 0:
            raise CheckpointError(f"attention description has the fields {sorted(data)}; the checkpoint needs a newer llm-fp4")
        first, second, third, fourth = (parse(data[n]) for n in ATTENTION_INPUTS)
        return cls((first, second, third, fourth), data["heads"])


@dataclass
class ProductPlan:
    """The decision for one product of two inputs, neither of them a weight.

    Attributes:
        formats, scales: of the first and of the second input; scales float32 () or (heads, 1, 1), the steps.
        error: squared error of the product over its squared norm, on the calibration sample.
    """

    formats: tuple[FloatFormat, FloatFormat]
    scales: tuple[Tensor, Tensor]
    error: float

    def to_json(self, names: tuple[str, str]) -> dict[str, Any]:
        inputs = {
            n: {"format": f.name, "scale": s.flatten().tolist()} for n, f, s in zip(names, self.formats, self.scales, strict=True)
        }
        return {"operands": list(names), **inputs, "error": self.error}
