"""Perplexity of SmolLM2 under recipes and bit widths, against its float reference.

    python benchmarks/quality.py [--rows 16/4/4:fpq 4/4/8:fpq ...] [--sequences 8] [--rounds 1] [--windows 16]

G = ln(perplexity / float perplexity). A row is BITS:RECIPE, with ``!`` after the bits to ignore the output head. ``--cost``
also gives each row's time in forward passes of the float model over the same calibration tokens (the median of three).
``--average-bits`` lets the widths of every row be chosen by measured sensitivity, ``--per-token`` gives inputs a scale per token,
``--sinks`` says what sites with attention sinks get, in the recipe's place; of several, every row is made with each.
``--reconstruction block`` learns rounding and scales block by block after the search, ``--rotation`` rotates as `balanced` does,
``--learned`` learns maps of inputs as `best` does, ``--outlier-tokens`` weighs outlier tokens down as `mxfp4` does.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import time
from itertools import product
from typing import Any

import torch
from common import WORK, record, smollm2, spread, texts
from transformers import AutoModelForCausalLM, AutoTokenizer

import llm_fp4
from llm_fp4.api.prepare import token_batches
from llm_fp4.evaluation import compare
from llm_fp4.recipe import Bits, Budget, Recipe

ROWS = [
    *(f"16/4/4!:{r}" for r in ("minmax-int", "minmax-fp", "fpq-baseline", "smoothquant", "fpq")),
    *(f"4/4/4:{r}" for r in ("minmax-int", "minmax-fp", "fpq-baseline", "fpq")),
    "4/4/16:fpq", "4/4/8:fpq", "6/6/6:fpq", "8/8/8:fpq",
]  # fmt: skip


def recipe_of(
    row: str, rounds: int, average_bits: float | None = None, per_token: bool = False, sinks: str | None = None, **search: object
) -> Recipe:
    """Return the recipe of a row."""
    bits, _, name = row.partition(":")
    recipe = llm_fp4.load_recipe(name)
    changes = {
        "bits": Bits.parse(bits.rstrip("!")),
        "search": recipe.search.model_copy(update={"rounds": rounds, **search}),
        "ignore": ["lm_head"] if "!" in bits else [],
    }
    changes |= {"budget": Budget(average_bits=average_bits)} if average_bits is not None else {}
    rules: dict[str, object] = {"granularity": "per_token", "shift_range": "search"} if per_token else {}
    rules |= {"sinks": sinks} if sinks else {}
    changes |= {"inputs": recipe.inputs.model_copy(update=rules)} if rules else {}
    return recipe.model_copy(update=changes)


@torch.no_grad()
def forward_seconds(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Return the seconds of one forward pass over all tokens, the median of three."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        for batch in token_batches(model, tokens, torch.device("cpu")):
            model(**batch)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _sinks(plan: dict[str, Any]) -> dict[str, object]:
    """Return the prefix of a plan, and how many of its inputs have a scale per token."""
    per_token = sum(site["granularity"] == "per_token" for site in plan["inputs"].values())
    return {"prefix": plan.get("prefix", {}).get("tokens"), "per_token_inputs": per_token, "inputs": len(plan["inputs"])}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rows", nargs="+", default=ROWS)
    arguments.add_argument("--sequences", type=int, nargs="+", default=[32], help="of calibration; every row is made with each")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--windows", type=int, default=16)
    arguments.add_argument("--length", type=int, default=512, help="tokens of a calibration sequence")
    arguments.add_argument(
        "--seed", type=int, default=0, help="of everything drawn; another one also starts at other calibration text"
    )
    arguments.add_argument("--propagation", choices=("sequential", "parallel"), default="sequential")
    arguments.add_argument("--compensation", choices=("none", "gptq", "gptaq"), help="instead of each row's own")
    arguments.add_argument("--inherited", type=float, help="search.inherited of gptaq")
    arguments.add_argument(
        "--damping", type=float, nargs="+", help="search.damping of error compensation; every row is made with each"
    )
    arguments.add_argument("--outlier-tokens", type=float, help="search.outlier_tokens")
    arguments.add_argument("--reconstruction", choices=("none", "block"), default="none")
    arguments.add_argument("--rotation", action="store_true")
    arguments.add_argument("--learned", action="store_true", help="maps of inputs")
    arguments.add_argument("--lm-head-bits", type=int, help="of rows that quantize the output head")
    arguments.add_argument("--average-bits", type=float)
    arguments.add_argument("--per-token", action="store_true")
    arguments.add_argument("--sinks", nargs="+", choices=("per_token", "static", "prefix"))
    arguments.add_argument("--cost", action="store_true")
    arguments.add_argument("--name", default="quality")
    a = arguments.parse_args()
    source = smollm2()
    calibration, held_out = texts(AutoTokenizer.from_pretrained(source))
    calibration = calibration.flatten()[: calibration.numel() // a.length * a.length].view(-1, a.length).roll(-a.seed, 0)
    measured = spread(held_out, a.windows)
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    rows = []
    for sequences, row, sinks, damping in product(a.sequences, a.rows, a.sinks or [None], a.damping or [None]):
        tokens, out = spread(calibration, sequences), WORK / f"{a.name}-checkpoint"
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(out.with_name(f"{out.name}.partial"), ignore_errors=True)
        start = time.perf_counter()
        search = {"propagation": a.propagation} | ({"compensation": a.compensation} if a.compensation else {})
        given = {"inherited": a.inherited, "damping": damping, "outlier_tokens": a.outlier_tokens}
        given = {key: value for key, value in given.items() if value is not None}
        search |= {**given, "reconstruction": a.reconstruction}
        wish = recipe_of(row, a.rounds, a.average_bits, a.per_token, sinks, **search).model_copy(update={"seed": a.seed})
        if a.lm_head_bits is not None:
            wish = wish.model_copy(update={"bits": wish.bits.model_copy(update={"lm_head": a.lm_head_bits})})
        changes: dict[str, object] = {"rotation": "hadamard", "online": True} if a.rotation else {}
        changes |= {"learned": True} if a.learned else {}
        wish = wish.model_copy(update={"transforms": wish.transforms.model_copy(update=changes)})
        llm_fp4.quantize(source, out, wish, tokens=tokens)
        seconds = time.perf_counter() - start
        result = compare(reference, {row: llm_fp4.load(out)}, measured)
        flat, ours = result["float"], result[row]
        gap = math.log(ours.perplexity / flat.perplexity)
        # measured beside the row, as the machine's speed drifts
        decided = json.loads((out / "plan.json").read_text())
        plan = decided.get("budget")
        budget = {k: plan[k] for k in ("limit", "takes", "narrowest", "kept_high", "tokens", "forward_passes")} if plan else {}
        forwards = {"forwards": seconds / forward_seconds(reference, tokens)} if a.cost else {}
        rows.append(
            {
                "row": row,
                "perplexity": ours.perplexity,
                "float": flat.perplexity,
                "G": gap,
                "kl": ours.kl,
                "top1": ours.top1,
                "seconds": seconds,
                "sequences": len(tokens),
                "rounds": a.rounds,
                **({"compensation": a.compensation} if a.compensation else {}),
                **given,
                **({"reconstruction": a.reconstruction} if a.reconstruction != "none" else {}),
                **({"rotation": True} if a.rotation else {}),
                **({"learned": True} if a.learned else {}),
                **({"lm_head_bits": a.lm_head_bits} if a.lm_head_bits is not None else {}),
                **({"length": a.length} if a.length != 512 else {}),
                **({"seed": a.seed} if a.seed else {}),
                **forwards,
                **({"per_token": True} if a.per_token else {}),
                **({"sinks": sinks, **_sinks(decided)} if sinks else {}),
                **({"budget": budget} if budget else {}),
            }
        )
        print(
            f"{row:24s} {sinks or damping or '':9} {sequences:3d} ppl {ours.perplexity:14.2f} (float {flat.perplexity:.2f})  G {gap:6.3f}  "
            f"KL {ours.kl:6.3f}  top-1 {ours.top1:.3f}  {seconds:5.0f} s"
            + "".join(f" = {f:.1f} forward passes" for f in forwards.values()),
            flush=True,
        )
        record(a.name, rows)


if __name__ == "__main__":
    main()
