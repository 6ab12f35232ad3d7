"""The whole schema of a recipe, and what holds for one module after overrides."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field, model_validator

from llm_fp4.errors import RecipeError
from llm_fp4.numerics import FloatFormat, PerBlock, formats_of_width, parse
from llm_fp4.recipe.budget import Budget
from llm_fp4.recipe.patterns import matches
from llm_fp4.recipe.sections import (
    FLOAT_BITS,
    AttentionRules,
    Bits,
    CacheRules,
    Calibration,
    InputRules,
    Override,
    SearchRules,
    ShiftRange,
    Strict,
    TransformRules,
    WeightRules,
)

_STANDARD = {3: "e2m0", 4: "e2m1", 5: "e2m2", 6: "e3m2", 7: "e3m3", 8: "e4m3"}  # what a method without search takes


class ModuleRule(Strict):
    """What holds for one module after overrides: candidate formats and the input's treatment.

    ``weight_blocks``, ``input_blocks``: the blocks that share a scale, None where rows, tokens or tensors do. ``transform``:
    whether the input passes a Hadamard transform as it arrives. ``unsigned_formats``: candidates for an input that is never negative.
    """

    weight_formats: tuple[FloatFormat, ...]
    input_formats: tuple[FloatFormat, ...]  # empty: the input stays float
    granularity: Literal["per_tensor", "per_token", "per_block"]
    shift: bool
    shift_range: ShiftRange = "format"
    weight_blocks: PerBlock | None = None
    input_blocks: PerBlock | None = None
    transform: bool = False
    unsigned_formats: tuple[FloatFormat, ...] = ()

    @property
    def site(self) -> tuple[Any, ...]:
        """What all operands of one input site have in common."""
        return (
            self.input_formats,
            self.granularity,
            self.shift,
            self.shift_range,
            self.weight_blocks,
            self.input_blocks,
            self.transform,
            self.unsigned_formats,
        )


class Recipe(Strict):
    """The whole wish. ``targets`` and ``ignore`` are names, globs or "re:" patterns of modules.

    ``patches``: convolutions that read patches side by side (patch embeddings) are linears over patches, called ``NAME.patches``.
    """

    name: str = "custom"
    method: Literal["fpq", "fpq-baseline", "minmax", "smoothquant"] = "fpq"
    bits: Bits = Bits()
    weights: WeightRules = WeightRules()
    inputs: InputRules = InputRules()
    attention: AttentionRules = AttentionRules()
    cache: CacheRules = CacheRules()
    transforms: TransformRules = TransformRules()
    search: SearchRules = SearchRules()
    calibration: Calibration = Calibration()
    targets: list[str] = Field(default=["*"])
    ignore: list[str] = Field(default=[])
    patches: bool = False
    overrides: list[Override] = Field(default=[])
    budget: Budget | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _check_objective(self) -> Recipe:
        if self.search.objective == "fisher":
            if self.method in ("minmax", "smoothquant"):
                raise ValueError(f"search.objective fisher weighs a search, and method {self.method} has none; use fpq")
            if self.transforms.rotation != "none":
                raise ValueError("search.objective fisher is not implemented with transforms.rotation; leave one of them out")
        if self.search.reconstruction != "none":
            if self.search.objective == "fisher":
                raise ValueError(
                    "search.reconstruction learns by the block's output, search.objective fisher by the model's; use one of them"
                )
            if self.search.compensation == "gptaq":
                raise ValueError("search.reconstruction answers to one block's errors, gptaq to earlier ones too; use gptq")
        if self.search.compensation == "gptaq" and self.search.propagation == "parallel":
            raise ValueError(
                "search.compensation gptaq makes up for what earlier layers do to an input, and with propagation parallel they do nothing; use gptq"
            )
        return self

    @model_validator(mode="after")
    def _check_reach(self) -> Recipe:
        """Refuse what would have no effect."""
        unsearched = {
            "search.compensation": self.search.compensation != "none",
            "search.bias_correction": self.search.bias_correction,
            "inputs.offset": self.inputs.offset != "none",
            "search.outlier_tokens": self.search.outlier_tokens is not None,
        }
        if self.searched is None and (key := next((k for k, wanted in unsearched.items() if wanted), None)):
            raise ValueError(f"{key} goes with a search, and method {self.method} has none; use method fpq, or leave it out")
        if self.transforms.online and self.transforms.rotation == "none":
            raise ValueError("transforms.online serves what a rotation does not reach; set transforms.rotation to hadamard too")
        return self

    @model_validator(mode="after")
    def _check_prefix(self) -> Recipe:
        if self.inputs.sinks == "prefix":
            others = {
                "search.objective fisher": self.search.objective == "fisher", "a budget": self.budget is not None,
                "quantized attention products": self.attention.bits != FLOAT_BITS,
                "a quantized cache": self.cache.bits != FLOAT_BITS,
            }  # fmt: skip
            if other := next((n for n, wanted in others.items() if wanted), None):
                raise ValueError(f"inputs.sinks prefix and {other} are not implemented together; set inputs.sinks to per_token")
        return self

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
        activation_bits, granularity = self.bits.activation, self.inputs.granularity
        if head and self.bits.lm_head is not None:
            activation_bits = max(activation_bits, self.bits.lm_head)
        shift, shift_range, transform = self.inputs.shift, self.inputs.shift_range, "none"
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
                shift_range = shift_range if o.shift_range is None else o.shift_range
                transform = transform if o.input_transform is None else o.input_transform
        rule = ModuleRule(
            weight_formats=self._candidates(weight_bits, weight_formats, f"the weight of {name}"),
            input_formats=self._candidates(activation_bits, self._signed(input_formats), f"the input of {name}"),
            granularity=granularity,
            shift=shift and self.method == "fpq" and granularity != "per_block",
            shift_range=shift_range,
            transform=transform == "hadamard",
            weight_blocks=self.weights.blocks if weight_granularity == "per_block" else None,
            input_blocks=self.inputs.blocks if granularity == "per_block" else None,
            unsigned_formats=self._unsigned(activation_bits, input_formats),
        )
        self._check_blocks(rule, name)
        return rule

    def _check_blocks(self, rule: ModuleRule, name: str) -> None:
        if (rule.weight_blocks or rule.input_blocks) and self.method == "smoothquant":
            raise RecipeError(f"{name}: method smoothquant has no block scales; use fpq or minmax")
        if rule.transform and self.method == "smoothquant":
            raise RecipeError(
                f"{name}: method smoothquant and a transform of its input are not implemented together; use fpq or minmax"
            )
        if rule.input_formats and rule.weight_formats and (rule.weight_blocks is None) != (rule.input_blocks is None):
            raise RecipeError(
                f"{name}: block scales on only one of weight and input are not implemented; make both granularities per_block, "
                "or the input 16 bits"
            )

    def with_transformed(self, names: list[str]) -> Recipe:
        """Return the recipe in which the inputs of ``names`` pass a Hadamard transform, unless an override says otherwise."""
        first = Override(targets=names, input_transform="hadamard")
        return self.model_copy(update={"overrides": [first, *self.overrides]})

    @property
    def prefix_wish(self) -> dict[str, int] | None:
        """The most tokens a prefix may have, None where none is wanted."""
        return {"most": self.inputs.prefix_tokens} if self.inputs.sinks == "prefix" else None

    @property
    def searched(self) -> SearchRules | None:
        """The rules of the search; None where the method has none, and largest magnitudes decide."""
        return self.search if self.method in ("fpq", "fpq-baseline") else None

    @property
    def widths(self) -> str:
        """What people are told about the widths: "4/4/4", or the budget that they are chosen for."""
        return str(self.budget or self.bits)

    def at(self, weight: int, activation: int) -> Recipe:
        """Return the recipe with these widths everywhere that its ``bits`` do not leave in float; overrides stay."""
        old, head = self.bits, self.bits.lm_head
        bits = Bits(
            embedding=weight if old.embedding != FLOAT_BITS else FLOAT_BITS,
            weight=weight if old.weight != FLOAT_BITS else FLOAT_BITS,
            activation=activation if old.activation != FLOAT_BITS else FLOAT_BITS,
            lm_head=head if head in (None, FLOAT_BITS) else None if old.weight != FLOAT_BITS else weight,
        )
        return self.model_copy(update={"bits": bits})

    def embedding_formats(self) -> tuple[FloatFormat, ...]:
        """Return the candidate formats of embeddings; empty where they stay float."""
        return self._candidates(self.bits.embedding, self.weights.formats, "the embedding")

    def attention_formats(self) -> tuple[tuple[FloatFormat, ...], tuple[FloatFormat, ...]]:
        """Return the candidate formats of query, key and value, and those of probabilities; empty where they stay float."""
        bits, rules = self.attention.bits, self.attention
        if bits == FLOAT_BITS:
            return (), ()
        names = rules.formats
        if names is None and self.inputs.granularity != "per_block":  # a block format is the linears', attention has no blocks
            names = self.inputs.formats
        if names is None:
            if self.method in ("minmax", "smoothquant"):
                standard = self._candidates(bits, None, "attention")
                first = standard[0]
                return standard, (
                    FloatFormat(first.exponent_bits, first.mantissa_bits + 1, signed=False),
                ) if rules.unsigned else standard
            return formats_of_width(bits), formats_of_width(bits, signed=not rules.unsigned)
        signed = self._candidates(bits, [n for n in names if n == "int" or parse(n).signed], "attention")
        if not rules.unsigned:
            return signed, signed
        given = tuple(parse(f"uint{bits}") if n == "int" else parse(n) for n in names)
        unsigned = tuple(f for f in given if f.bits == bits and not f.signed)
        return signed, unsigned or signed

    def cache_formats(self) -> tuple[FloatFormat, ...]:
        """Return the candidate formats of cached keys and values; empty where they stay float."""
        bits, names = self.cache.bits, self.cache.formats
        if names is None:  # the inputs' are of another width, maybe
            names = [n for n in self.inputs.formats or [] if n == "int" or parse(n).bits == bits] or None
        return self._candidates(bits, names, "the cache")

    def _signed(self, names: list[str] | None) -> list[str] | None:
        """Return the names for inputs of either sign, where unsigned ones are allowed beside them."""
        if names is None or not self.inputs.unsigned:
            return names
        return [n for n in names if n == "int" or parse(n).signed]

    def _unsigned(self, bits: int, names: list[str] | None) -> tuple[FloatFormat, ...]:
        """Return the unsigned candidates of an input; none where the recipe does not allow or the method does not search them."""
        if bits == FLOAT_BITS or not self.inputs.unsigned or self.searched is None:
            return ()
        if names is None:  # without a mantissa bit the sign's bit is spent on range alone, beyond what integers hold
            return tuple(f for f in formats_of_width(bits, signed=False) if f.mantissa_bits)
        given = (parse(f"uint{bits}") if n == "int" else parse(n) for n in names)
        return tuple(f for f in given if f.bits == bits and not f.signed)

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
