"""What a search costs, in forward passes of the float model over the same calibration tokens.

    python benchmarks/cost.py [--sequences 32] [--rounds 3] [--recipe fpq]

The paper's effort is 3 rounds over all formats on 16,384 tokens. One forward pass is the median of three.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time

import torch
from common import WORK, record, smollm2, spread, texts
from transformers import AutoModelForCausalLM, AutoTokenizer

import llm_fp4
from llm_fp4.api.prepare import token_batches


@torch.no_grad()
def forward_seconds(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Return the seconds of one forward pass over all tokens."""
    start = time.perf_counter()
    for batch in token_batches(tokens, torch.device("cpu")):
        model(**batch)
    return time.perf_counter() - start


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--sequences", type=int, default=32)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--recipe", default="fpq")
    a = arguments.parse_args()
    source, out = smollm2(), WORK / "cost"
    tokens = spread(texts(AutoTokenizer.from_pretrained(source))[0], a.sequences)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    before = [forward_seconds(model, tokens) for _ in range(2)]
    recipe = llm_fp4.load_recipe(a.recipe)
    recipe = recipe.model_copy(update={"search": recipe.search.model_copy(update={"rounds": a.rounds})})
    for folder in (out, out.with_name("cost.partial")):
        shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    llm_fp4.quantize(source, out, recipe, tokens=tokens)
    seconds = time.perf_counter() - start
    forward = statistics.median([*before, forward_seconds(model, tokens)])  # one after, as the machine's speed drifts
    row = {
        "recipe": a.recipe,
        "rounds": a.rounds,
        "tokens": tokens.numel(),
        "seconds": seconds,
        "forward": forward,
        "forwards": seconds / forward,
    }
    print(
        f"{a.recipe}, {a.rounds} rounds, {tokens.numel()} tokens: {seconds:.0f} s = {seconds / forward:.1f} forward passes of {forward:.1f} s"
    )
    record("cost", [row])


if __name__ == "__main__":
    main()
