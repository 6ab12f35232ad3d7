"""Perplexity of SmolLM2 against the length of context: float, static and per-token input scales, keys and values in codes.

    python benchmarks/context.py [--rows float 4/4/4 4/4/4:per_token 16/16/16+4 ...] [--contexts 512 2048 8192] [--windows 1]

Every context cuts the same tokens of WikiText-2 validation's first half; all models are calibrated on 512-token windows of its
second half. A row is BITS, with ``:static`` (one scale at every input) or ``:per_token`` (none), and ``+N`` for keys and values in
N bits, which are read back in pieces of 64 tokens, so from position 512 on past what was calibrated. ``@1`` decodes token by token.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import time
from typing import Any

import torch
from common import WORK, record, recorded, smollm2, spread, texts
from transformers import AutoModelForCausalLM, AutoTokenizer

import llm_fp4
from llm_fp4.api import Loaded, evaluate_contexts, load_any
from llm_fp4.integrations.cache import cache_bytes
from llm_fp4.models import continued
from llm_fp4.recipe import Bits, Recipe

ROWS = ["float", "16/16/16+8", "16/16/16+6", "16/16/16+4", "4/4/4:static", "4/4/4", "4/4/4:per_token", "4/4/4:per_token+4"]
SIZE = 2048  # tokens at which a cache's bytes and the speed of a step are taken
STEPS = 16


def recipe_of(row: str, rounds: int) -> Recipe:
    """Return the recipe of a row."""
    bits, inputs, cache = re.fullmatch(r"([\d/]+)(?::(\w+))?(?:\+(\d+))?", row).groups()  # type: ignore[union-attr]
    data: dict[str, Any] = llm_fp4.load_recipe("fpq").model_dump()
    data["bits"] = Bits.parse(bits).model_dump()
    data["search"]["rounds"] = rounds
    data["inputs"] |= {"static": {"sinks": "static"}, "per_token": {"granularity": "per_token"}, None: {}}[inputs]
    data["cache"]["bits"] = int(cache or 16)
    return Recipe.model_validate(data)


@torch.inference_mode()
def cost(model: Any, ids: torch.Tensor) -> dict[str, float]:
    """Return the bytes a token of the cache takes after (SIZE,) ``ids``, and the median milliseconds of a step there."""
    cache: Any = None
    for piece in ids.split(256):
        _, cache = continued(model, piece[None], cache)
    size, seconds = cache_bytes(cache), []
    for token in ids[:STEPS]:
        start = time.perf_counter()
        _, cache = continued(model, token.view(1, 1), cache)
        seconds.append(time.perf_counter() - start)
    return {"cache_bytes_a_token": size / len(ids), "step_ms": 1000 * statistics.median(seconds)}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rows", nargs="+", default=ROWS)
    arguments.add_argument("--contexts", nargs="+", type=int, default=[512, 1024, 2048, 4096, 8192])
    arguments.add_argument("--windows", type=int, default=1)
    arguments.add_argument("--sequences", type=int, default=8)
    arguments.add_argument("--rounds", type=int, default=1)
    arguments.add_argument("--name", default="context")
    arguments.add_argument("--keep", action="store_true", help="take over the perplexities that results/NAME.json has already")
    a = arguments.parse_args()
    source = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(source)
    calibration, held_out = texts(tokenizer)
    tokens, text = spread(calibration, a.sequences), held_out.flatten()
    rows: list[dict[str, Any]] = []
    kept = {r["row"]: r for r in recorded(a.name)} if a.keep else {}
    for name in a.rows:
        row, _, chunk = name.partition("@")
        out = WORK / f"context-{row.replace('/', '-').replace(':', '-')}"
        if row == "float":
            loaded = Loaded(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval(), tokenizer, False, row)
        else:
            if not out.exists():
                llm_fp4.quantize(source, out, recipe_of(row, a.rounds), tokens=tokens)
            loaded = load_any(out)
        if name in kept:  # speeds are of one run
            rows.append({**kept[name], **cost(loaded.model, text[:SIZE])})
            continue
        warnings: list[str] = []
        start = time.perf_counter()
        found = evaluate_contexts(
            loaded, a.contexts, text=text, windows=a.windows, chunk=int(chunk) if chunk else None, warn=warnings.append
        )
        entry: dict[str, Any] = {
            "row": name, "perplexity": {n: m["model"].perplexity for n, m in found.items()}, "seconds": time.perf_counter() - start,
            "warnings": warnings, "calibration": f"{len(tokens)} x {tokens.shape[1]} tokens, {a.rounds} round(s)", **cost(loaded.model, text[:SIZE]),
        }  # fmt: skip
        base = {int(n): p for n, p in rows[0]["perplexity"].items()} if rows and rows[0]["row"] == "float" else {}
        entry["G"] = {n: math.log(p / base[n]) for n, p in entry["perplexity"].items() if n in base}
        rows.append(entry)
        record(a.name, rows)
        cells = "  ".join(f"{n}: {p:8.2f}" for n, p in entry["perplexity"].items())
        print(f"{name:20s} {cells}  {entry['cache_bytes_a_token']:.0f} B/token  {entry['step_ms']:.1f} ms/step", flush=True)
        for sentence in warnings:
            print(f"    {sentence}", flush=True)


if __name__ == "__main__":
    main()
