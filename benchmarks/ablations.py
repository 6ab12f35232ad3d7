"""The paper's ablations, and questions it leaves open, on ViT-Ti/16 and SmolLM2-135M at 4/4/4.

python ablations.py vit                                # every row; python ablations.py smollm2 for the other model
python ablations.py vit --only "gamma 0.5 to 1.5"      # a part; rows measured before are kept
python ablations.py vit --recipe fpq-gptq              # one more row: any named recipe or YAML file, under "method"

One row changes one thing of the base: FPQ, one round, log2 grid, layer-wise search of output error. The ranges of gamma are the
paper's, on its grid of biases. KL is that of the model's answer from the float model's; top-1 of ViT counts right classes of
photographs, that of SmolLM2 equal next tokens.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from common import WORK, record, recorded, smollm2, spread, texts
from learned_formats import learned_formats
from vit import MODEL, pixels

import llm_fp4
from llm_fp4.api import load_any
from llm_fp4.evaluation import class_logits, compare, top_k
from llm_fp4.models import find_structure
from llm_fp4.recipe import Recipe, load_recipe

CANDIDATES = 40  # of the paper's grid, which has 100
IMAGES, WINDOWS = 200, 16  # measured on
SIZES = {"vit": (8, 16, 32, 64), "smollm2": (1, 2, 4, 8)}  # images; sequences of 512 tokens
BASE = {"vit": 32, "smollm2": 4}
GAMMAS = ((0.01, 1.2), (0.1, 1.2), (0.5, 1.5))


@dataclass(frozen=True)
class Row:
    """One setting: which question it belongs to, what it changes of the base, and how much it is calibrated on."""

    question: str
    size: int
    search: dict[str, Any] = field(default_factory=dict)
    recipe: str = "fpq"
    signed: bool = False  # inputs in signed formats alone
    learned: bool = False  # formats by gradient, see learned_formats.py


def rows_of(model: str) -> dict[str, Row]:
    """Return the settings of a model by name."""
    base = BASE[model]
    rows = {f"calibration {n}": Row("calibration size", n) for n in SIZES[model]}
    for low, high in GAMMAS:
        paper = {"grid": "paper", "candidates": CANDIDATES, "gamma": (low, high)}
        rows[f"gamma {low} to {high}"] = Row("range of gamma", base, paper)
    return rows | {
        "output error": Row("objective", base),
        "Fisher-weighted": Row("objective", base, {"objective": "fisher"}),
        "sequential": Row("inputs of a block", base),
        "parallel": Row("inputs of a block", base, {"propagation": "parallel"}),
        "layer-wise search": Row("method", base),
        "block-wise reconstruction": Row("method", base, {"reconstruction": "block"}),
        "compensated, layer-wise": Row("method", base, recipe="fpq-gptq"),
        "compensated, then block-wise": Row("method", base, {"reconstruction": "block"}, "fpq-gptq"),
        "signed formats searched": Row("formats", base, signed=True),
        "signed formats learned by gradient": Row("formats", base, signed=True, learned=True),
        "baseline without shift": Row("method", base, recipe="fpq-baseline"),
    }


def recipe_of(row: Row, model: str) -> Recipe:
    """Return the recipe of a row: attention products in ViT, all scales static there as in the paper."""
    data = load_recipe(row.recipe).model_dump()
    data["search"] |= {"rounds": 1, **row.search}
    data["inputs"]["unsigned"] &= not row.signed
    if model == "vit":
        data["inputs"]["sinks"] = "static"
        data["attention"] |= {"bits": 4, "unsigned": False}
    return Recipe.model_validate(data)


Measure = Callable[[Recipe, int], dict[str, float]]
Learn = Callable[[int], list[dict[str, Any]]]  # the overrides that name learned formats, from so much calibration data


def vit() -> tuple[Measure, Learn]:
    """Return what quantizes ViT-Ti and measures it, and what learns its formats."""
    most = max(SIZES["vit"])
    calibration, images, labels = pixels(IMAGES, most)
    batches = [{"pixel_values": part} for part in images.split(25)]
    flat = class_logits(load_any(MODEL).model, batches, "float")

    def measure(recipe: Recipe, size: int) -> dict[str, float]:
        model = llm_fp4.quantize_module(load_any(MODEL).model, calibration[:size].split(16), recipe)
        logits = class_logits(model, batches, recipe.name)
        found = top_k(logits, labels, flat)
        kl = torch.nn.functional.kl_div(logits.log_softmax(1), flat.log_softmax(1), log_target=True, reduction="batchmean")
        return {"kl": float(kl), "top1": found.top1, "agreement": found.agreement or 0.0, "float_top1": top_k(flat, labels).top1}

    def learn(size: int) -> list[dict[str, Any]]:
        model, parts = load_any(MODEL).model, calibration[:size].split(8)
        return learned_formats(model, inner_linears(model), lambda m, i: m(pixel_values=parts[i]).logits, len(parts))

    return measure, learn


def language() -> tuple[Measure, Learn]:
    """Return what quantizes SmolLM2 and measures it, and what learns its formats."""
    source = smollm2()
    flat = load_any(source)
    calibration, held_out = texts(flat.tokenizer)
    windows = spread(held_out, WINDOWS)

    def measure(recipe: Recipe, size: int) -> dict[str, float]:
        out = WORK / "ablation"
        for old in (out, out.with_name("ablation.partial")):
            shutil.rmtree(old, ignore_errors=True)
        llm_fp4.quantize(source, out, recipe, tokens=spread(calibration, size))
        found = compare(flat.model, {"ours": llm_fp4.load(out)}, windows)
        ours = found["ours"]
        return {
            "kl": ours.kl or 0.0,
            "top1": ours.top1 or 0.0,
            "perplexity": ours.perplexity,
            "float_perplexity": found["float"].perplexity,
        }

    def learn(size: int) -> list[dict[str, Any]]:
        parts, names = spread(calibration, size).split(1), inner_linears(flat.model)
        return learned_formats(flat.model, names, lambda m, i: m(input_ids=parts[i]).logits[0], len(parts))

    return measure, learn


def inner_linears(model: torch.nn.Module) -> list[str]:
    """Return the names of the linears inside the blocks."""
    return [n for names in find_structure(model).linears.values() for n in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=BASE)
    parser.add_argument("--only", action="append")
    parser.add_argument("--recipe", action="append", default=[])
    options = parser.parse_args()
    rows = rows_of(options.model) | {r: Row("method", BASE[options.model], recipe=r) for r in options.recipe}
    if strange := set(options.only or ()) - set(rows):
        raise SystemExit(f"no row {sorted(strange)[0]!r}; there are {', '.join(rows)}")
    wanted = options.only or options.recipe or list(rows)
    known = {r["row"]: r for r in recorded(f"ablations-{options.model}")}
    measure, learn = vit() if options.model == "vit" else language()
    same: dict[tuple[str, int], dict[str, float]] = {}  # several questions have the base as an answer
    for name in wanted:
        row, began = rows[name], time.monotonic()
        recipe = recipe_of(row, options.model)
        if row.learned:
            recipe = Recipe.model_validate({**recipe.model_dump(), "overrides": learn(row.size)})
        key = (recipe.model_dump_json(), row.size)
        found = same[key] = same.get(key) or measure(recipe, row.size)
        known[name] = {
            "row": name,
            "question": row.question,
            "size": row.size,
            **found,
            "seconds": round(time.monotonic() - began, 1),
        }
        print(f"{row.question:18s} {name:24s}" + "".join(f"  {k} {v:.3f}" for k, v in found.items()), flush=True)
        record(f"ablations-{options.model}", list(known.values()))


if __name__ == "__main__":
    main()
