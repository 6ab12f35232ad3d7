"""The section of a recipe that leaves the widths to a solver: what may be spent, and on which widths."""

from __future__ import annotations

import re

from pydantic import Field, field_validator, model_validator

from llm_fp4.recipe.sections import FLOAT_BITS, Strict

WIDTHS = (4, 5, 6, 8)
_PAIR = re.compile(r"(\d+)/(\d+)")


class Budget(Strict):
    """One limit, and the widths to choose from; the recipe's ``bits`` then only say what stays in float (16).

    ``average_bits``: of the weights' elements, and of the inputs' elements (one token at every site): neither mean exceeds it.
    ``bytes``: of the checkpoint's tensors. ``kl``: the predicted divergence of the outputs from the float model's, nats a
    prediction; the fewest bits that reach it are taken. ``choices``: "weight/activation" bits a linear may have; 16 bits of
    activation leave its input in float. ``tokens``: of the calibration data, on which sensitivity is measured.
    """

    average_bits: float | None = Field(default=None, ge=3, le=16)
    bytes: int | None = Field(default=None, ge=1)
    kl: float | None = Field(default=None, gt=0)
    choices: list[str] = Field(default=[f"{w}/{a}" for w in WIDTHS for a in WIDTHS], min_length=1)
    tokens: int = Field(default=1024, ge=16)

    @field_validator("choices")
    @classmethod
    def _check_choices(cls, choices: list[str]) -> list[str]:
        for choice in choices:
            match = _PAIR.fullmatch(choice)
            if not match:
                raise ValueError(f"{choice!r} is no pair of weight/activation bits; write 4/8, say")
            weight, activation = int(match[1]), int(match[2])
            if not 3 <= weight <= 8 or not (3 <= activation <= 8 or activation == FLOAT_BITS):
                raise ValueError(f"{choice} is not possible; weights take 3 to 8 bits, activations 3 to 8 or 16")
        return choices

    @model_validator(mode="after")
    def _check_limit(self) -> Budget:
        if sum(limit is not None for limit in (self.average_bits, self.bytes, self.kl)) != 1:
            raise ValueError("give one of average_bits, bytes and kl")
        return self

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Return the choices as (weight bits, activation bits), the narrowest first."""
        return sorted({(int(w), int(a)) for w, a in (c.split("/") for c in self.choices)})

    @property
    def limit(self) -> dict[str, float]:
        """Return the one limit by its name."""
        found = {"average_bits": self.average_bits, "bytes": self.bytes, "kl": self.kl}
        return {name: value for name, value in found.items() if value is not None}

    def __str__(self) -> str:
        ((name, value),) = self.limit.items()
        return {"average_bits": f"{value:g} bits on average", "bytes": f"{value:,} bytes", "kl": f"a divergence of {value:g}"}[name]
