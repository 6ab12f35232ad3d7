"""Options that several commands share, and a recipe with the options that override its fields."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llm_fp4.recipe import Bits, Recipe, load_recipe, validated

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
Device = Annotated[str, typer.Option("--device", help="Where to compute: cpu or cuda.", metavar="cpu|cuda")]
RecipeName = Annotated[
    str, typer.Option("--recipe", "-r", help="A named recipe (see llm-fp4 recipes) or a YAML file.", metavar="NAME|FILE")
]
BitsOption = Annotated[
    str | None,
    typer.Option(
        "--bits", "-b", metavar="E/W/A", show_default=False,
        help="Bits of embedding, weight and activation: 3 to 8, or 16 for float.  [default: the recipe's, 4/4/4]",
    ),
]  # fmt: skip
LmHeadBits = Annotated[
    int | None,
    typer.Option(
        "--lm-head-bits",
        metavar="N",
        show_default=False,
        help="Bits of the output head's weight.  [default: the recipe's, or as weight]",
    ),
]
CalibrationSource = Annotated[
    str | None,
    typer.Option(
        "--calibration", "-c", metavar="SOURCE", show_default=False,
        help="'self' (the model's own text), a .txt, .jsonl, .parquet, .tsv or .csv file, a hub data set, a folder of images or sound.  [default: self]",
    ),
]  # fmt: skip
Attention = Annotated[
    int | None,
    typer.Option(
        "--attention", metavar="BITS", show_default=False,
        help="Bits of the inputs of both attention products: 3 to 8, or 16 for float.  [default: 16]",
    ),
]  # fmt: skip
AverageBits = Annotated[
    float | None,
    typer.Option(
        "--average-bits", metavar="X", show_default=False,
        help="Choose the width of every weight and input by measured sensitivity: X bits on average at most, of weights and of inputs.",
    ),
]  # fmt: skip
MaxBytes = Annotated[
    int | None,
    typer.Option("--max-bytes", metavar="N", min=1, show_default=False, help="Likewise, but a checkpoint of N bytes at most."),
]
MaxKl = Annotated[
    float | None,
    typer.Option(
        "--max-kl", metavar="X", show_default=False,
        help="Likewise, but the fewest bits at which the predicted divergence from the float model is X nats at most.",
    ),
]  # fmt: skip
CacheBits = Annotated[
    int | None,
    typer.Option(
        "--cache-bits", metavar="BITS", show_default=False,
        help="Bits of the keys and values a decoder keeps while it writes: 3 to 8, or 16 for float.  [default: 16]",
    ),
]  # fmt: skip
Sequences = Annotated[
    int | None, typer.Option("--sequences", help="Calibration sequences.  [default: 32]", metavar="N", min=1, show_default=False)
]
Length = Annotated[
    int | None,
    typer.Option("--length", help="Tokens in a calibration sequence.  [default: 512]", metavar="N", min=2, show_default=False),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore",
        help="Leave layers of this name, glob or re:REGEX in float; may be repeated.",
        metavar="PATTERN",
        show_default=False,
    ),
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--targets",
        help="Quantize only layers of this name, glob or re:REGEX; may be repeated.",
        metavar="PATTERN",
        show_default=False,
    ),
]
Seed = Annotated[
    int | None, typer.Option("--seed", help="Of everything drawn at random.  [default: 0]", metavar="N", show_default=False)
]


def recipe_of(
    name: str, *, bits: str | None = None, lm_head_bits: int | None = None, calibration: str | None = None, sequences: int | None = None,
    length: int | None = None, ignore: list[str] | None = None, targets: list[str] | None = None, rounds: int | None = None,
    propagation: str | None = None, objective: str | None = None, attention: int | None = None, cache_bits: int | None = None,
    seed: int | None = None, average_bits: float | None = None, max_bytes: int | None = None, max_kl: float | None = None,
) -> Recipe:  # fmt: skip
    """Return the recipe called ``name`` with every option that was given in the place of its field.

    Raises:
        RecipeError: no such recipe, or a value its schema refuses.
    """
    data = load_recipe(name).model_dump()
    if bits is not None:
        data["bits"] = {**Bits.parse(bits).model_dump(), "lm_head": data["bits"]["lm_head"]}
    given: list[tuple[str, str, Any]] = [
        ("bits", "lm_head", lm_head_bits), ("calibration", "source", calibration), ("calibration", "sequences", sequences),
        ("calibration", "length", length), ("search", "rounds", rounds), ("search", "propagation", propagation),
        ("search", "objective", objective), ("attention", "bits", attention), ("cache", "bits", cache_bits),
    ]  # fmt: skip
    for section, key, value in given:
        if value is not None:
            data[section][key] = value
    limits = {k: v for k, v in (("average_bits", average_bits), ("bytes", max_bytes), ("kl", max_kl)) if v is not None}
    if limits:  # in the place of the recipe's own
        data["budget"] = {**(data["budget"] or {}), "average_bits": None, "bytes": None, "kl": None, **limits}
    data |= {k: v for k, v in (("ignore", ignore), ("targets", targets), ("seed", seed)) if v not in (None, [])}
    recipe: Recipe = validated(Recipe, data, "the options")
    return recipe
