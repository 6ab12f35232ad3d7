"""What the search decided: one InputPlan for each input site, one WeightPlan for each weight.

An *input site* is a tensor quantized once and read by all its operands (q/k/v; gate/up). The structural
half of a plan (formats, granularity, shift range) is an :class:`InputSpec` and travels in ``config.json``;
scales and shifts travel as tensors; errors and reasons stay in ``plan.json`` for people.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from llm_fp4.errors import CheckpointError, RecipeError, UnsupportedError
from llm_fp4.numerics import FloatFormat, PerBlock, PerRow, parse, parse_granularity, scale_values, step_of

LIMB = 127  # the largest magnitude of one signed int8 limb
TWO_LIMBS = 16383  # high * 128 + low with low in 0..127 and high in -128..127


@dataclass(frozen=True)
class InputSpec:
    """How an input is quantized, without the numbers.

    Attributes:
        granularity: "per_tensor" (static scale), "per_token" (the scale of each row is its largest
            shifted magnitude times the stored ratio, over the largest level), or "per_block_16_e4m3" and the like (the scale of
            each block is its largest magnitude over the largest value, rounded to E4M3 over the stored scale).
        max_shift: the largest channel shift, 0 where there is none.
        smooth: whether a real factor per channel divides the input first (SmoothQuant).
        transform: "hadamard" where the input passes ``kernels.hadamard`` before it is quantized, "kronecker_24x24" and the like where
            it is multiplied by a Kronecker product of stored (24, 24) and (24, 24) factors; its weights were transformed to match.
        offset: whether a real number per channel is subtracted from the input before all else but the transform; what it
            would have added to the output is in the operands' biases. An unsigned format wants an input that it makes non-negative.
    """

    format: FloatFormat
    granularity: str = "per_tensor"
    max_shift: int = 0
    smooth: bool = False
    offset: bool = False
    transform: str | None = None

    def __post_init__(self) -> None:
        if self.granularity not in ("per_tensor", "per_token") and self.blocks is None:
            raise UnsupportedError(
                f"input granularity {self.granularity!r} is not implemented; use per_tensor, per_token or per_block_16_e4m3, say"
            )
        if self.blocks is not None and (self.max_shift or self.smooth):
            raise UnsupportedError("channel shifts and smoothing of inputs with block scales are not implemented; leave them out")
        if self.offset and self.smooth:
            raise UnsupportedError("an input offset beside smoothing is not implemented; leave one of them out")
        if self.transform not in (None, "hadamard") and self.factors is None:
            raise UnsupportedError(
                f"input transform {self.transform!r} is not implemented; use hadamard or kronecker_24x24, say, or leave it out of the plan"
            )
        if self.transform is not None and self.smooth:
            raise UnsupportedError("an input transform beside smoothing is not implemented; leave one of them out")
        if not 0 <= self.max_shift <= 127:
            raise UnsupportedError(f"input max_shift {self.max_shift} is outside 0 to 127")

    @cached_property
    def blocks(self) -> PerBlock | None:
        """The blocks that share a scale, None where whole rows or tensors do."""
        if not self.granularity.startswith("per_block"):
            return None
        try:
            blocks = parse_granularity(self.granularity)
        except RecipeError as error:
            raise UnsupportedError(f"input granularity: {error}") from None
        if not isinstance(blocks, PerBlock) or blocks.scale_dtype == "float32":
            raise UnsupportedError(f"input granularity {self.granularity!r} names no stored scale; write per_block_16_e4m3, say")
        return blocks

    @cached_property
    def factors(self) -> tuple[int, int] | None:
        """The sizes (a, b) of a Kronecker transform's factors, None where there is no such transform."""
        found = re.fullmatch(r"kronecker_([1-9]\d*)x([1-9]\d*)", self.transform or "")
        return (int(found[1]), int(found[2])) if found else None

    @property
    def top(self) -> int:
        """The largest integer the quantized input reaches, in steps of its most shifted channel."""
        return self.format.max_level << self.max_shift

    @property
    def limbs(self) -> int:
        """How many int8 limbs hold the shifted levels; 0 where two do not suffice and the product is in float."""
        if self.blocks is not None:
            return 0
        return 1 if self.top <= LIMB else 2 if self.top <= TWO_LIMBS else 0

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {"format": self.format.name, "granularity": self.granularity, "max_shift": self.max_shift}
        out |= {"transform": self.transform} if self.transform else {}
        out |= {"offset": True} if self.offset else {}
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
        left, right: (a, a) and (b, b) float32 factors of a Kronecker transform, or None.
        offset: (in,) float32 that is subtracted from the input, or None.
        error: squared output error over the output's squared norm, calibration tokens, all operands.
        clipped: share of the calibration sample's values beyond what a static scale reaches.
    """

    name: str
    operands: list[str]
    spec: InputSpec
    scale: Tensor
    shift: Tensor | None = None
    smooth: Tensor | None = None
    offset: Tensor | None = None
    error: float | None = None
    sink_ratio: float | None = None
    reason: str = ""
    clipped: float | None = None
    left: Tensor | None = None
    right: Tensor | None = None

    def to_json(self) -> dict[str, Any]:
        histogram = None
        if self.shift is not None:
            histogram = torch.bincount(self.shift.long(), minlength=self.spec.max_shift + 1).tolist()
        return {
            "operands": self.operands, **self.spec.to_json(), "scale": float(self.scale), "shift_histogram": histogram,
            "error": self.error, "sink_ratio": self.sink_ratio, "reason": self.reason, "clipped": self.clipped,
        }  # fmt: skip


@dataclass
class WeightPlan:
    """The decision for one weight: format and scales; ``error`` is that of its own output, relative.

    Attributes:
        scale: (out,) float32, the step of each row; or (out, blocks) stored scales of blocks.
        second_scale: () float32 over E4M3 scales of blocks, the same for all operands of a site.
    """

    name: str
    format: FloatFormat
    scale: Tensor
    error: float | None = None
    granularity: PerRow | PerBlock = field(default_factory=PerRow)
    second_scale: Tensor | None = None

    def step(self, columns: int) -> Tensor:
        """Return the float32 step of every value: (out, 1), or (out, columns) for block scales."""
        step = step_of(self.scale, self.format, self.granularity, self.second_scale)
        return self.granularity.expand(step, (len(step), columns))

    def to_json(self) -> dict[str, Any]:
        s = scale_values(self.scale) if isinstance(self.granularity, PerBlock) else self.scale
        out = {"format": self.format.name, "scale_min": float(s.min()), "scale_max": float(s.max()), "error": self.error}
        if isinstance(self.granularity, PerBlock):
            second = None if self.second_scale is None else float(self.second_scale)
            out |= {"granularity": self.granularity.name, "second_scale": second}
        return out


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
        bias: (out,) float32 to be added to an operand's bias: what the input's offset took away, the mean error with its sign
            changed, or both. An operand without bias gains one.
    """

    input: InputPlan | None
    weights: dict[str, WeightPlan]
    rounded: dict[str, Tensor] = field(default_factory=dict)
    bias: dict[str, Tensor] = field(default_factory=dict)


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

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the stored tensors."""
        return {f"{n}_scale": self.scale_shape for n in ATTENTION_INPUTS}

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
