"""The paper's zero-shot table in miniature: ARC-e and PIQA, five methods, four bit widths, SmolLM2.

    python benchmarks/zeroshot.py [--bits 4/4/4 4/4/8 4/4/16 8/8/8] [--items 100] [--sequences 8] [--rounds 1]

Needs ``zeroshot/*.jsonl`` of the data that README.md here lists (``query``, ``choices``, ``gold``); ``acc`` as in the paper.
"""

from __future__ import annotations

import argparse
import shutil

import torch
from common import DATA, WORK, record, smollm2, spread, texts
from quality import recipe_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import llm_fp4
from llm_fp4.evaluation import ANSWER, read_items, score_choices

METHODS = ("minmax-int", "minmax-fp", "fpq-baseline", "fpq", "fpq-gptq")
TASKS = {"ARC-e": "arc_easy.jsonl", "PIQA": "piqa.jsonl"}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--bits", nargs="+", default=["4/4/4", "4/4/8", "4/4/16", "8/8/8"])
    arguments.add_argument("--methods", nargs="+", default=list(METHODS))
    arguments.add_argument("--items", type=int, default=100)
    arguments.add_argument("--sequences", type=int, default=8)
    arguments.add_argument("--rounds", type=int, default=1)
    arguments.add_argument("--name", default="zeroshot")
    a = arguments.parse_args()
    if not DATA.is_dir():
        raise SystemExit(
            f"the zero-shot items are not at {DATA}; README.md here says what belongs there, LLM_FP4_DATA names another folder"
        )
    source = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokens = spread(texts(tokenizer)[0], a.sequences)
    items = {task: read_items(DATA / "zeroshot" / file, a.items) for task, file in TASKS.items()}
    rows = []

    def measure(title: str, bits: str, model: torch.nn.Module) -> None:
        scores = {task: score_choices(model, tokenizer, i, suffix=ANSWER).acc for task, i in items.items()}
        average = sum(scores.values()) / len(scores)
        rows.append({"method": title, "bits": bits, "items": a.items, **scores, "average": average})
        print(
            f"{bits:8s} {title:14s} " + "  ".join(f"{t} {s:.3f}" for t, s in scores.items()) + f"  average {average:.3f}",
            flush=True,
        )
        record(a.name, rows)

    measure("float", "16/16/16", AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    for bits in a.bits:
        for method in a.methods:
            out = WORK / f"{a.name}-checkpoint"
            for folder in (out, out.with_name(f"{out.name}.partial")):
                shutil.rmtree(folder, ignore_errors=True)
            llm_fp4.quantize(source, out, recipe_of(f"{bits}:{method}", a.rounds), tokens=tokens)
            measure(method, bits, llm_fp4.load(out))


if __name__ == "__main__":
    main()
