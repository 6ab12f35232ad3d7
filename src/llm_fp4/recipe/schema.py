"""The schema of a recipe: every key with its type, and what holds for one module after overrides."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from llm_fp4.errors import RecipeError
from llm_fp4.numerics import FloatFormat, PerBlock, formats_of_width, parse

FLOAT_BITS = 16  # the width that means "left in float"
_STANDARD = {3: "e2m0", 4: "e2m1", 5: "e2m2", 6: "e3m2", 7: "e3m3", 8: "e4m3"}  # what a method without search takes


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _check_bits(value: int | None) -> int | None:
    if value is not None and value != FLOAT_BITS and not 3 <= value <= 8:
        raise ValueError(f"{value} bits is not possible; choose 3 to 8, or 16 for float")
    return value


class Bits(_Strict):
    """Widths of embedding, weights and activations; 16 leaves a tensor in float. ``lm_head`` is ``weight`` unless set."""

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


class _BlockRules(_Strict):
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
    ``shift``: pre-shifted exponent bias. ``sinks``: what to do with a site whose largest token exceeds the median
    token ``sink_ratio`` times: "per_token" gives that site a scale per token, "static" keeps the one scale.
    """

    formats: list[str] | None = None
    granularity: Literal["per_tensor", "per_token", "per_block"] = "per_tensor"
    shift: bool = True
    sinks: Literal["per_token", "static"] = "per_token"
    sink_ratio: float = Field(default=8.0, gt=1)

    _check = field_validator("formats")(_check_formats)


class AttentionRules(_Strict):
    """How the inputs of attention's two products, query · key' and probability · value, are quantized; 16 bits leave them in float.

    ``formats``: candidates; None: those of the inputs, or all. ``unsigned``: probabilities, never negative, take unsigned formats.
    """

    bits: int = FLOAT_BITS
    formats: list[str] | None = None
    unsigned: bool = True
    granularity: Literal["per_tensor", "per_head"] = "per_tensor"

    _bits = field_validator("bits")(_check_bits)
    _formats = field_validator("formats")(_check_formats)


class SearchRules(_Strict):
    """Effort of the search.

    ``grid``: "log2" around the calibrated maximum, or the "paper"'s multiples of the bias. ``propagation``: inputs through
    the quantized blocks before, or the float model's own. ``compensation``: after the search, choose levels so that
    later columns make up for the errors of earlier ones; ``damping`` is added to its Hessian; ``sweeps`` of coordinate
    descent over levels and scales follow it, from ``starts`` different first scales.
    """

    grid: Literal["log2", "paper"] = "log2"
    rounds: int = Field(default=3, ge=1)
    candidates: int = Field(default=100, ge=2, description="points of the paper grid")
    sample_tokens: int = Field(default=1024, ge=16)
    propagation: Literal["sequential", "parallel"] = "sequential"
    compensation: Literal["none", "gptq"] = "none"
    damping: float = Field(default=0.03, gt=0, lt=1)
    sweeps: int = Field(default=4, ge=0)
    starts: int = Field(default=3, ge=1, le=5)


class Calibration(_Strict):
    """``source``: "self", a .txt, .jsonl, .json.gz or .parquet file, or a hub data set name."""

    source: str = "self"
    sequences: int = Field(default=32, ge=1)
    length: int = Field(default=512, ge=2)


class Override(_Strict):
    """Settings for the modules that ``targets`` match; None keeps the recipe's."""

    targets: list[str] = Field(min_length=1)
    weight_bits: int | None = None
    activation_bits: int | None = None
    weight_formats: list[str] | None = None
    input_formats: list[str] | None = None
    weight_granularity: Literal["per_row", "per_block"] | None = None
    input_granularity: Literal["per_tensor", "per_token", "per_block"] | None = None
    shift: bool | None = None

    _bits = field_validator("weight_bits", "activation_bits")(_check_bits)
    _formats = field_validator("weight_formats", "input_formats")(_check_formats)


class ModuleRule(_Strict):
    """What holds for one module after overrides: candidate formats and the input's treatment.

    ``weight_blocks``, ``input_blocks``: the blocks that share a scale, None where rows, tokens or tensors do.
    """

    weight_formats: tuple[FloatFormat, ...]
    input_formats: tuple[FloatFormat, ...]  # empty: the input stays float
    granularity: Literal["per_tensor", "per_token", "per_block"]
    shift: bool
    weight_blocks: PerBlock | None = None
    input_blocks: PerBlock | None = None

    @property
    def site(self) -> tuple[Any, ...]:
        """What all operands of one input site have in common."""
        return self.input_formats, self.granularity, self.shift, self.weight_blocks, self.input_blocks


class Recipe(_Strict):
    """The whole wish. ``targets`` and ``ignore`` are names, globs or "re:" patterns of modules."""

    name: str = "custom"
    method: Literal["fpq", "fpq-baseline", "minmax", "smoothquant"] = "fpq"
    bits: Bits = Bits()
    weights: WeightRules = WeightRules()
    inputs: InputRules = InputRules()
    attention: AttentionRules = AttentionRules()
    search: SearchRules = SearchRules()
    calibration: Calibration = Calibration()
    targets: list[str] = ["*"]
    ignore: list[str] = []
    overrides: list[Override] = []
    seed: int = 0

    def selects(self, name: str) -> bool:
        """Return whether the module called ``name`` is to be quantized."""
        return any(matches(p, name) for p in self.targets) and not any(matches(p, name) for p in self.ignore)

    def check_patterns(self, names: Iterable[str]) -> None:
        """Raise RecipeError for a pattern that matches none of ``names``, listing some of them."""
        names = list(names)
        patterns = [("targets", p) for p in self.targets] + [("ignore", p) for p in self.ignore]
        patterns += [("overrides", p) for o in self.overrides for p in o.targets]
        for where, pattern in patterns:
            if not any(matches(pattern, name) for name in names):
                some = ", ".join(sorted(set(names), key=len)[:4])
                raise RecipeError(
                    f"pattern {pattern!r} in {where} matches no module; the model has {some}, ... (see llm-fp4 inspect)"
                )

    def rule(self, name: str, *, head: bool = False) -> ModuleRule:
        """Return the rule of the linear called ``name``; ``head`` marks the output projection.

        Raises:
            RecipeError: no candidate format has the width asked for.
        """
        weight_bits = self.bits.lm_head if head and self.bits.lm_head is not None else self.bits.weight
        activation_bits, granularity, shift = self.bits.activation, self.inputs.granularity, self.inputs.shift
        weight_formats, input_formats, weight_granularity = self.weights.formats, self.inputs.formats, self.weights.granularity
        for o in self.overrides:
            if any(matches(p, name) for p in o.targets):
                weight_bits = weight_bits if o.weight_bits is None else o.weight_bits
                activation_bits = activation_bits if o.activation_bits is None else o.activation_bits
                weight_formats = weight_formats if o.weight_formats is None else o.weight_formats
                input_formats = input_formats if o.input_formats is None else o.input_formats
                weight_granularity = weight_granularity if o.weight_granularity is None else o.weight_granularity
                granularity = granularity if o.input_granularity is None else o.input_granularity
                shift = shift if o.shift is None else o.shift
        rule = ModuleRule(
            weight_formats=self._candidates(weight_bits, weight_formats, f"the weight of {name}"),
            input_formats=self._candidates(activation_bits, input_formats, f"the input of {name}"),
            granularity=granularity,
            shift=shift and self.method == "fpq" and granularity != "per_block",
            weight_blocks=self.weights.blocks if weight_granularity == "per_block" else None,
            input_blocks=self.inputs.blocks if granularity == "per_block" else None,
        )
        self._check_blocks(rule, name)
        return rule

    def _check_blocks(self, rule: ModuleRule, name: str) -> None:
        if (rule.weight_blocks or rule.input_blocks) and self.method == "smoothquant":
            raise RecipeError(f"{name}: method smoothquant has no block scales; use fpq or minmax")
        if rule.input_formats and rule.weight_formats and (rule.weight_blocks is None) != (rule.input_blocks is None):
            raise RecipeError(
                f"{name}: block scales on only one of weight and input are not implemented; make both granularities per_block, "
                "or the input 16 bits"
            )

    def embedding_formats(self) -> tuple[FloatFormat, ...]:
        """Return the candidate formats of embeddings; empty where they stay float."""
        return self._candidates(self.bits.embedding, self.weights.formats, "the embedding")

    def attention_formats(self) -> tuple[tuple[FloatFormat, ...], tuple[FloatFormat, ...]]:
        """Return the candidate formats of query, key and value, and those of probabilities; empty where they stay float."""
        bits, rules = self.attention.bits, self.attention
        if bits == FLOAT_BITS:
            return (), ()
        names = rules.formats if rules.formats is not None else self.inputs.formats
        if names is None:
            if self.method in ("minmax", "smoothquant"):
                standard = self._candidates(bits, None, "attention")
                first = standard[0]
                return standard, (FloatFormat(first.exponent_bits, first.mantissa_bits + 1, signed=False),) if rules.unsigned else standard
            return formats_of_width(bits), formats_of_width(bits, signed=not rules.unsigned)
        signed = self._candidates(bits, [n for n in names if n == "int" or parse(n).signed], "attention")
        if not rules.unsigned:
            return signed, signed
        given = tuple(parse(f"uint{bits}") if n == "int" else parse(n) for n in names)
        unsigned = tuple(f for f in given if f.bits == bits and not f.signed)
        return signed, unsigned or signed

    def _candidates(self, bits: int, names: list[str] | None, what: str) -> tuple[FloatFormat, ...]:
        if bits == FLOAT_BITS:
            return ()
        if names is None:
            if self.method in ("minmax", "smoothquant"):  # no search: one format
                return (parse(_STANDARD[bits]) if self.method == "minmax" else parse(f"int{bits}"),)
            return formats_of_width(bits)
        chosen = tuple(f for f in (parse(f"int{bits}") if n == "int" else parse(n) for n in names) if f.bits == bits)
        if not chosen:
            raise RecipeError(
                f"none of the formats {', '.join(names)} has the {bits} bits asked for {what}; change the formats or the bits"
            )
        if unsigned := [f.name for f in chosen if not f.signed]:
            raise RecipeError(f"unsigned formats ({', '.join(unsigned)}) are not implemented for {what}; use signed ones")
        return chosen


def matches(pattern: str, name: str) -> bool:
    """Return whether ``pattern`` selects module ``name``.

    "re:REGEX" must match the whole name; otherwise a glob over the whole name or over its last parts.

    >>> matches("down_proj", "model.layers.3.mlp.down_proj"), matches("model.layers.1.*", "model.layers.12.mlp")
    (True, False)
    """
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def validated(model: type[Any], data: Any, where: str) -> Any:
    """Return ``model`` built from ``data``, or raise RecipeError with the first problem in one sentence."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"])
        if first["type"] == "extra_forbidden":
            known = ", ".join(sorted(model.model_fields))
            raise RecipeError(f"{where}: unknown key {place!r}; known at the top level: {known}") from None
        message = first["msg"].removeprefix("Value error, ")
        raise RecipeError(f"{where}: {place}: {message}") from None
