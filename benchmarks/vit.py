"""ViT-Ti/16 on photographs: top-1, top-5 and agreement with the float model, attention products quantized.

python vit.py --images 100 --only "FPQ 4/4/4"      # a part; rows measured before are kept
"""

from __future__ import annotations

import argparse
import csv
import time
from typing import Any

import torch
from common import DATA, record, recorded

import llm_fp4
from llm_fp4.api import load_any
from llm_fp4.api.media import image_batches, processor_of
from llm_fp4.evaluation import class_logits, top_k
from llm_fp4.recipe import PRESETS, Recipe

MODEL = DATA / "models" / "vit_tiny_patch16_224"


def rule(preset: str, bits: int, **fields: Any) -> Recipe:
    """Return a recipe with every width, of attention too, at ``bits``; signed formats and static scales unless ``fields`` say otherwise."""
    base = PRESETS[preset]
    inputs = {**base.get("inputs", {}), "sinks": "static", "unsigned": False, **fields.pop("inputs", {})}
    attention = {"bits": bits, "unsigned": False, **fields.pop("attention", {})}
    widths = {"embedding": bits, "weight": bits, "activation": bits}
    return Recipe.model_validate({**base, "name": preset, "bits": widths, "inputs": inputs, "attention": attention, **fields})


RECIPES: dict[str, Recipe] = {
    "FPQ 4/4/4, unsigned formats": rule("fpq", 4, inputs={"unsigned": True}, attention={"unsigned": True}),
    "FPQ 4/4/4, unsigned, learned rounding": rule(
        "fpq", 4, inputs={"unsigned": True}, attention={"unsigned": True}, search={"reconstruction": "block"}
    ),
    "FPQ 4/4/4, unsigned, shift range searched": rule(
        "fpq", 4, inputs={"unsigned": True, "shift_range": "search"}, attention={"unsigned": True}
    ),
    "best 4/4/4, unsigned": rule("best", 4, inputs={"unsigned": True}, attention={"unsigned": True}),
    "FPQ 8/8/8": rule("fpq", 8, inputs={"granularity": "per_token"}),
    "FPQ 6/6/6": rule("fpq", 6, inputs={"granularity": "per_token"}),
    "FPQ 4/4/4": rule("fpq", 4),
    "FPQ 4/4/4, unsigned, scale per token": rule("fpq", 4, attention={"unsigned": True}, inputs={"granularity": "per_token"}),
    "FPQ baseline 4/4/4": rule("fpq-baseline", 4),
    "MinMax FP 4/4/4": rule("minmax-fp", 4),
}


def pixels(count: int, calibration: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return calibration images, images to measure on and their labels: photographs evenly spread, none in both."""
    with (DATA / "images" / "labels.tsv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: count + calibration].tolist()
    files = [DATA / "images" / "val" / rows[i]["file"] for i in order]
    batches = image_batches(files, processor_of(MODEL, "image", str(MODEL)), torch.device("cpu"))
    images = torch.cat([b["pixel_values"] for b in batches])
    return images[:calibration], images[calibration:], torch.tensor([int(rows[i]["class"]) for i in order[calibration:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--calibration", type=int, default=32)
    parser.add_argument("--only", action="append", choices=RECIPES)
    options = parser.parse_args()
    calibration, images, labels = pixels(options.images, options.calibration)
    batches = [{"pixel_values": part} for part in images.split(25)]
    flat = class_logits(load_any(MODEL).model, batches, "float")
    rows = {r["recipe"]: r for r in recorded("vit") if r["images"] == options.images and r["calibration"] == options.calibration}
    for name in ("float", *(options.only or RECIPES)):
        began = time.monotonic()
        logits = flat
        if name != "float":
            model = llm_fp4.quantize_module(load_any(MODEL).model, calibration.split(16), RECIPES[name])
            logits = class_logits(model, batches, name)
        found = top_k(logits, labels, flat)
        rows[name] = {
            "recipe": name, "top1": found.top1, "top5": found.top5, "agreement": found.agreement, "images": options.images,
            "calibration": options.calibration, "seconds": round(time.monotonic() - began, 1),
        }  # fmt: skip
        print(f"{name:40s} top-1 {found.top1:.3f}  top-5 {found.top5:.3f}  agreement {found.agreement:.3f}", flush=True)
        record("vit", list(rows.values()))


if __name__ == "__main__":
    main()
