"""LLaMA-7B's shapes with random weights: memory of the process, seconds a block, and an estimate of a whole run.

    python benchmarks/llama7b.py [--blocks 2] [--compensation none]

Two of its 32 blocks are quantized, embedding and output head too, on 512 tokens, with one format and two candidates: a search by the
defaults needs the same memory but for its token rows, which lie in a file, and longer. What 32 blocks would take with
the same settings is an estimate: the mean block, 32 times.
"""

from __future__ import annotations

import argparse
import json

from common import WORK, record
from memory import peak_anonymous, synthetic

BLOCKS = 32  # of LLaMA-7B
RUN = """
import json, sys, time, torch, llm_fp4
from llm_fp4.recipe import Recipe
times = []
def note(stage, done, total):
    if stage == "quantize":
        times.append(time.perf_counter())
one = {"formats": ["e2m1"]}
search = {"rounds": 1, "sample_tokens": 256, "grid": "paper", "candidates": 2, "compensation": "COMPENSATION", "starts": 1, "sweeps": 1}
recipe = Recipe.model_validate({"weights": one, "inputs": one, "search": search})
tokens = torch.randint(0, 32000, (2, 256), generator=torch.Generator().manual_seed(0))
llm_fp4.quantize(sys.argv[1], sys.argv[2], recipe, tokens=tokens, progress=note)
with open(sys.argv[2] + ".times.json", "w") as file:
    json.dump([b - a for a, b in zip(times, times[1:])], file)
"""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--blocks", type=int, default=2)
    arguments.add_argument("--compensation", choices=["none", "gptq"], default="none")
    a = arguments.parse_args()
    source, out = WORK / f"llama7b-{a.blocks}", WORK / "llama7b-out"
    synthetic(source, a.blocks, 4096, 11008, 32000)
    peak, seconds = peak_anonymous(source, out, RUN.replace("COMPENSATION", a.compensation))
    embeddings, *blocks, head = json.loads(out.with_name(f"{out.name}.times.json").read_text())
    whole = embeddings + BLOCKS * sum(blocks) / len(blocks) + head
    print(f"{a.blocks} blocks: peak anonymous memory {peak / 2**30:.2f} GiB, {seconds:.0f} s in all")
    print(f"seconds: embeddings {embeddings:.0f}, blocks {', '.join(f'{s:.0f}' for s in blocks)}, head {head:.0f}")
    print(f"{BLOCKS} blocks with these settings: about {whole / 60:.0f} minutes (an estimate)")
    record(f"llama7b-{a.compensation}", [
        {"blocks": a.blocks, "compensation": a.compensation, "tokens": 512, "peak_bytes": peak, "seconds": seconds,
         "seconds_embeddings": embeddings, "seconds_blocks": blocks, "seconds_head": head, "estimated_seconds_of_32_blocks": whole},
    ])  # fmt: skip


if __name__ == "__main__":
    main()
