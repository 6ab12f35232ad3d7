"""The sections of a recipe: every key with its type."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from llm_fp4.errors import RecipeError
from llm_fp4.numerics import PerBlock, parse
from llm_fp4.recipe.check import validated

FLOAT_BITS = 16  # the width that means "left in float"


class Strict(BaseModel):
    """A section whose unknown keys are refused and whose values stay as they were set."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _check_bits(value: int | None) -> int | None:
    if value is not None and value != FLOAT_BITS and not 3 <= value <= 8:
        raise ValueError(f"{value} bits is not possible; choose 3 to 8, or 16 for float")
    return value


class Bits(Strict):
    """Widths of embedding, weights and activations; 16 leaves a tensor in float.

    ``lm_head`` is the width of the output head's weight, ``weight`` unless set; its input has at least that width too.
    """

    embedding: int = 4
    weight: int = 4
    activation: int = 4
    lm_head: int | None = None

    _check = field_validator("embedding", "weight", "activation", "lm_head")(_check_bits)

    @classmethod
    def parse(cls, text: str, lm_head: int | None = None) -> Bits:
        """Return the widths of "E/W/A", 4/4/8 say.

        Raises:
            RecipeError: the text is not of that form or a width is impossible.
        """
        if not re.fullmatch(r"\d+/\d+/\d+", text):
            raise RecipeError(f"--bits {text!r} is not embedding/weight/activation bits; write 4/4/4 or 16/4/8, say")
        embedding, weight, activation = map(int, text.split("/"))
        widths = {"embedding": embedding, "weight": weight, "activation": activation, "lm_head": lm_head}
        bits: Bits = validated(cls, widths, f"--bits {text}")
        return bits

    def __str__(self) -> str:
        return f"{self.embedding}/{self.weight}/{self.activation}"


def _check_formats(names: list[str] | None) -> list[str] | None:
    for name in names or []:
        if name != "int":
            try:
                parse(name)
            except RecipeError as error:
                raise ValueError(str(error)) from None
    return names


ShiftRange = Literal["format", "int8", "search", "every"] | int


def _check_shift_range(value: Any) -> Any:
    if value in (None, "format", "int8", "search", "every") or (type(value) is int and 0 <= value <= 15):
        return value
    raise ValueError(f"a shift range of {value} is not possible; choose 0 to 15, format, int8, search or every")


class _BlockRules(Strict):
    block_size: int = Field(default=16, ge=1)
    scale_dtype: Literal["e4m3", "e8m0", "float16"] = "e4m3"

    @property
    def blocks(self) -> PerBlock:
        return PerBlock(self.block_size, self.scale_dtype)


class WeightRules(_BlockRules):
    """``formats``: candidates, each applied where the width fits ("int" is the integer grid of any width); None: all.

    ``granularity``: one scale a row, or "per_block": one for each ``block_size`` values, stored as ``scale_dtype``.
    """

    formats: list[str] | None = None
    granularity: Literal["per_row", "per_block"] = "per_row"

    _check = field_validator("formats")(_check_formats)


class InputRules(_BlockRules):
    """How inputs are quantized.

    ``granularity``: "per_block" scales each ``block_size`` values of a token when it runs, in ``scale_dtype``.
    ``shift``: pre-shifted exponent bias. ``shift_range``: its largest shift: "format" as the paper has it (2^e - 1), "int8" the
    most that one int8 limb holds, a number, "search": 0 or either, by error at each site, or
    "every": any up to that of int8, or the format's, likewise.
    ``sinks``: what to do with a site whose largest token exceeds the median token ``sink_ratio`` times: "per_token" gives
    that site a scale per token, "static" keeps the one scale; "prefix" puts a few tokens before every sequence that take the part of
    the sink, in float, and gives a scale per token where that does not help; beside block scales it is the prefix alone.
    ``prefix_tokens``: the most tokens of a prefix.
    ``offset``: "mean" subtracts each channel's mean before rounding, at sites where that lowers the output error; biases make up
    for it. ``unsigned``: inputs with hardly a negative value take unsigned formats, their minimum subtracted, where that does.
    """

    formats: list[str] | None = None
    granularity: Literal["per_tensor", "per_token", "per_block"] = "per_tensor"
    shift: bool = True
    shift_range: ShiftRange = "format"
    sinks: Literal["per_token", "static", "prefix"] = "per_token"
    sink_ratio: float = Field(default=8.0, gt=1)
    prefix_tokens: int = Field(default=4, ge=1, le=8)
    offset: Literal["none", "mean"] = "none"
    unsigned: bool = True

    _check = field_validator("formats")(_check_formats)
    _shifts = field_validator("shift_range", mode="before")(_check_shift_range)


class TransformRules(Strict):
    """``rotation``: a random orthogonal map of the residual stream and of each head's values, merged into the weights (models
    like LLaMA). ``online``: with it, a Hadamard transform of inputs that no merged rotation reaches (down_proj), as they arrive.
    ``learned``: instead, a linear map of every quantized input, computed as it arrives, learned block by block with the error of the
    block's output, in ``epochs`` passes over the calibration data with steps of ``learning_rate`` (any model).
    """

    rotation: Literal["none", "hadamard"] = "none"
    online: bool = False
    learned: bool = False
    epochs: int = Field(default=8, ge=1)
    learning_rate: float = Field(default=0.01, gt=0, le=1)


class AttentionRules(Strict):
    """How the inputs of attention's two products, query · key' and probability · value, are quantized; 16 bits leave them in float.

    ``formats``: candidates; None: those of the inputs (not of block formats), or all. ``unsigned``: probabilities, never negative, take unsigned formats.
    """

    bits: int = FLOAT_BITS
    formats: list[str] | None = None
    unsigned: bool = True
    granularity: Literal["per_tensor", "per_head"] = "per_tensor"

    _bits = field_validator("bits")(_check_bits)
    _formats = field_validator("formats")(_check_formats)


class CacheRules(Strict):
    """How the keys and values that a decoder keeps while it writes are held; 16 bits keep them in float.

    Keys have one static scale a head and channel, values a scale a token and head. ``formats``: candidates; None: those of the
    inputs, or all. ``window``: the newest tokens that stay in float. ``sinks``: the first tokens that do.
    """

    bits: int = FLOAT_BITS
    formats: list[str] | None = None
    window: int = Field(default=64, ge=0)
    sinks: int = Field(default=4, ge=0)

    _bits = field_validator("bits")(_check_bits)
    _formats = field_validator("formats")(_check_formats)


class SearchRules(Strict):
    """Effort of the search.

    ``objective``: "output", the squared error of a layer's output, or "fisher", the same times the squared gradient of the
    model's loss there, for which the float model is differentiated whole, once.
    ``grid``: "log2" around the calibrated maximum, or the "paper"'s multiples of the bias, from the first ``gamma`` to the
    second. ``propagation``: inputs through
    the quantized blocks before, or the float model's own. ``compensation``: after the search, choose levels so that
    later columns make up for the errors of earlier ones ("gptq"), and all of them for what the quantized layers before did to the
    input ("gptaq", for which the float model's blocks run beside the quantized ones), or for the share ``inherited`` of it;
    ``damping`` times its mean diagonal is added to the Hessian; ``sweeps`` of coordinate descent over levels and scales follow
    it, from ``starts`` different first scales (of blocks, three at most). ``bias_correction``: a layer's bias takes the
    mean of its output error, which the search then leaves out. ``outlier_tokens``: tokens of more than so many
    times the site's median energy together count no more in squared errors than all others; None: all count as they are.
    ``reconstruction``: "block" then learns the rounding of each block's weights, their row scales and the inputs' scales together by
    the error of the block's output, in ``reconstruction_epochs`` passes over the calibration data.
    """

    objective: Literal["output", "fisher"] = "output"
    grid: Literal["log2", "paper"] = "log2"
    rounds: int = Field(default=3, ge=1)
    candidates: int = Field(default=100, ge=2, description="points of the paper grid")
    gamma: tuple[float, float] = (0.01, 1.2)
    sample_tokens: int = Field(default=1024, ge=16)
    propagation: Literal["sequential", "parallel"] = "sequential"
    compensation: Literal["none", "gptq", "gptaq"] = "none"
    damping: float = Field(default=0.1, gt=0, lt=1)
    inherited: float = Field(default=0.25, ge=0, le=1)
    sweeps: int = Field(default=4, ge=0)
    starts: int = Field(default=3, ge=1, le=5)
    bias_correction: bool = False
    outlier_tokens: float | None = Field(default=None, ge=1)
    reconstruction: Literal["none", "block"] = "none"
    reconstruction_epochs: int = Field(default=8, ge=1)

    @field_validator("gamma")
    @classmethod
    def _check_gamma(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not value[0] < value[1]:
            raise ValueError(f"gamma from {value[0]} to {value[1]} is no range; write the smaller first")
        return value


class Calibration(Strict):
    """``source``: "self", a .txt, .jsonl, .json.gz or .parquet file, or a hub data set name."""

    source: str = "self"
    sequences: int = Field(default=32, ge=1)
    length: int = Field(default=512, ge=2)


class Override(Strict):
    """Settings for the modules that ``targets`` match; None keeps the recipe's."""

    targets: list[str] = Field(min_length=1)
    weight_bits: int | None = None
    activation_bits: int | None = None
    weight_formats: list[str] | None = None
    input_formats: list[str] | None = None
    weight_granularity: Literal["per_row", "per_block"] | None = None
    input_granularity: Literal["per_tensor", "per_token", "per_block"] | None = None
    shift: bool | None = None
    shift_range: ShiftRange | None = None
    input_transform: Literal["none", "hadamard"] | None = None

    _shifts = field_validator("shift_range", mode="before")(_check_shift_range)
    _bits = field_validator("weight_bits", "activation_bits")(_check_bits)
    _formats = field_validator("weight_formats", "input_formats")(_check_formats)
