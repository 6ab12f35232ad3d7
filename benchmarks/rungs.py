"""What each rung beyond the paper brings, alone and on top of those before it, and what it costs: the tables of docs/recipes.md.

    python rungs.py smollm2                           # 16/4/4, head ignored, 2,048 calibration tokens
    python rungs.py vit                               # 4/4/4, 64 photographs; minilm: 4/4/4, 128 sentences
    python rungs.py smollm2 --only "+ rotation"       # a part; rows measured before are kept

The base is FPQ with one round. A row "rung" adds one thing to it; a row "+ rung" adds it to all the "+" rows above; the rows
of named recipes are these as they are, but for what all rows of a model have in common. What a model does not allow is said,
not skipped. Beside each row's seconds stand those of a forward pass of the float model over the calibration data, the median of
three at that moment: their ratio is the cost.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from typing import Any

import torch
from ablations import Measure, language, vit
from common import record, recorded, smollm2, spread, texts
from minilm import minilm, task
from vit import MODEL, pixels

import llm_fp4
from llm_fp4.api import load_any
from llm_fp4.errors import LlmFp4Error
from llm_fp4.recipe import Recipe, load_recipe

Changes = dict[str, dict[str, Any]]
RUNGS: dict[str, Changes] = {
    "shift range searched": {"inputs": {"shift_range": "search"}},
    "every shift range searched": {"inputs": {"shift_range": "every"}},
    "error compensation": {"search": {"compensation": "gptq"}},
    "compensation, outlier tokens": {"search": {"compensation": "gptq", "outlier_tokens": 16}},
    "rotation": {"transforms": {"rotation": "hadamard", "online": True}},
    "scale per token": {"inputs": {"granularity": "per_token"}},
    "offsets": {"inputs": {"offset": "mean"}},
    "bias correction": {"search": {"bias_correction": True}},
    "learned rounding": {"search": {"reconstruction": "block"}},
}
LADDER = {
    "smollm2": ("shift range searched", "error compensation", "rotation", "scale per token", "learned rounding"),
    "vit": ("shift range searched", "error compensation", "scale per token", "bias correction", "learned rounding"),
    "minilm": ("shift range searched", "error compensation", "scale per token", "bias correction"),
}
NAMED = {"learned maps (best)": "best"} | {f"recipe {name}": name for name in ("fast", "balanced", "nvfp4", "mxfp4")}
SIZES = {"smollm2": 4, "vit": 64, "minilm": 128}
OWN: dict[str, Changes] = {  # what a model's rows have in common
    "smollm2": {"bits": {"embedding": 16}},
    "vit": {"attention": {"bits": 4}},
    "minilm": {"attention": {"bits": 4}},
}


def rows_of(model: str) -> dict[str, list[str]]:
    """Return the rungs of every row."""
    ladder = LADDER[model]
    rows: dict[str, list[str]] = {"FPQ": []} | {r: [r] for r in RUNGS}
    return rows | {f"+ {r}": list(ladder[: i + 1]) for i, r in enumerate(ladder) if i} | {name: [] for name in NAMED}


def recipe_of(model: str, name: str, rungs: list[str]) -> Recipe:
    """Return the recipe of a row."""
    data = load_recipe(NAMED.get(name, "fpq")).model_dump()
    for changes in (OWN[model], {"search": {"rounds": 1}}, *(RUNGS[r] for r in rungs)):
        for section, fields in changes.items():
            data[section] |= fields
    data["ignore"] = {"smollm2": ["lm_head"], "vit": [], "minilm": ["pooler.dense"]}[model]
    return Recipe.model_validate({**data, "name": "rung"})


def float_pass(model: str) -> tuple[torch.nn.Module, list[dict[str, torch.Tensor]]]:
    """Return the float model and the calibration data it reads in one pass."""
    if model == "minilm":
        return load_any(minilm()).model, task(1, SIZES[model])[0]
    flat = load_any(MODEL if model == "vit" else smollm2())
    if model == "vit":
        return flat.model, [{"pixel_values": part} for part in pixels(1, SIZES[model])[0].split(16)]
    return flat.model, [{"input_ids": part} for part in spread(texts(flat.tokenizer)[0], SIZES[model]).split(4)]


@torch.no_grad()
def forward_seconds(net: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> float:
    """Return the seconds of one pass of the float model, the median of three."""
    found = []
    for _ in range(3):
        start = time.perf_counter()
        for batch in batches:
            net(**batch)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def sentences() -> Measure:
    """Return what quantizes MiniLM and measures it on the 1,500 pairs of STS-B dev."""
    batches, spearman = task(1500, SIZES["minilm"])
    flat = spearman(load_any(minilm()).model)

    def measure(recipe: Recipe, size: int) -> dict[str, float]:
        found = spearman(llm_fp4.quantize_module(load_any(minilm()).model, batches, recipe))
        return {"spearman": found, "float_spearman": flat, "loss": flat - found}

    return measure


def measured(measure: Measure, recipe: Recipe, size: int) -> dict[str, Any]:
    """Return what a recipe reaches, or why the model does not allow it."""
    start = time.perf_counter()
    try:
        found: dict[str, Any] = dict(measure(recipe, size))
    except LlmFp4Error as error:
        return {"refused": str(error)}
    if "perplexity" in found:
        found["G"] = math.log(found["perplexity"] / found["float_perplexity"])
    return {**found, "seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=LADDER)
    parser.add_argument("--only", action="append")
    options = parser.parse_args()
    rows = rows_of(options.model)
    if strange := set(options.only or ()) - set(rows):
        raise SystemExit(f"no row {sorted(strange)[0]!r}; there are {', '.join(rows)}")
    known = {r["row"]: r for r in recorded(f"rungs-{options.model}")}
    measure = sentences() if options.model == "minilm" else (vit() if options.model == "vit" else language())[0]
    once = float_pass(options.model)
    for name in options.only or rows:
        recipe = recipe_of(options.model, name, rows[name])
        found = measured(measure, recipe, SIZES[options.model])
        known[name] = {"row": name, "rungs": rows[name], **found, "forward_seconds": forward_seconds(*once)}
        print(
            f"{name:28s}",
            {k: round(v, 3) if isinstance(v, float) else v for k, v in known[name].items() if k not in ("row", "rungs")},
            flush=True,
        )
        record(f"rungs-{options.model}", list(known.values()))


if __name__ == "__main__":
    main()
