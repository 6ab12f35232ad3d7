"""Peak anonymous memory of quantizing a synthetic LLaMA of width 2048 with 4 and with 32 blocks.

    python benchmarks/memory.py [--blocks 4 32] [--width 2048]

The checkpoint is written shard by shard with random weights; each run is a process of its own, whose anonymous memory
(RssAnon) is sampled over the whole run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import WORK, record
from safetensors.torch import save_file
from transformers import LlamaConfig

RUN = """
import sys, torch, llm_fp4
from llm_fp4.recipe import Recipe
tokens = torch.randint(0, 1000, (4, 128), generator=torch.Generator().manual_seed(0))
one = {"formats": ["e2m1"]}  # one format and two candidates: memory is the same, time is not
search = {"rounds": 1, "sample_tokens": 128, "grid": "paper", "candidates": 2}
recipe = Recipe.model_validate({"weights": one, "inputs": one, "search": search})
llm_fp4.quantize(sys.argv[1], sys.argv[2], recipe, tokens=tokens)
"""


def synthetic(folder: Path, blocks: int, width: int, inner: int | None = None, vocabulary: int = 1000) -> None:
    """Write a LLaMA of ``blocks`` blocks with random weights, one bfloat16 shard a block."""
    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    inner, weight_map = inner or width * 11 // 4, {}
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=blocks, num_attention_heads=width // 128,
        num_key_value_heads=width // 128, architectures=["LlamaForCausalLM"], tie_word_embeddings=False,
    )  # fmt: skip

    def shard(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {
            n: torch.ones(s, dtype=torch.bfloat16) if len(s) == 1 else (torch.randn(s) * 0.02).bfloat16() for n, s in shapes.items()
        }
        save_file(tensors, folder / name)
        weight_map.update(dict.fromkeys(shapes, name))

    for i in range(blocks):
        p = f"model.layers.{i}."
        square = {f"{p}self_attn.{n}_proj.weight": (width, width) for n in "qkvo"}
        wide = {
            f"{p}mlp.gate_proj.weight": (inner, width),
            f"{p}mlp.up_proj.weight": (inner, width),
            f"{p}mlp.down_proj.weight": (width, inner),
        }
        norms = {f"{p}input_layernorm.weight": (width,), f"{p}post_attention_layernorm.weight": (width,)}
        shard(f"block-{i:03d}.safetensors", square | wide | norms)
    shard(
        "outer.safetensors",
        {"model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)},
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config.save_pretrained(folder)


def peak_anonymous(source: Path, out: Path, script: str = RUN) -> tuple[int, float]:
    """Return the peak RssAnon in bytes and the seconds of one run of ``script``."""
    for folder in (out, out.with_name(f"{out.name}.partial")):
        shutil.rmtree(folder, ignore_errors=True)
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, "-c", script, str(source), str(out)])
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max([peak, *(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))])
        except OSError:
            break
        time.sleep(0.002)  # the largest temporaries live for some milliseconds
    if process.wait() != 0:
        raise SystemExit("the run failed")
    return peak, time.perf_counter() - start


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--blocks", type=int, nargs="+", default=[4, 32])
    arguments.add_argument("--width", type=int, default=2048)
    a = arguments.parse_args()
    rows = []
    for blocks in a.blocks:
        folder = WORK / f"synthetic-{a.width}-{blocks}"
        synthetic(folder, blocks, a.width)
        peak, seconds = peak_anonymous(folder, WORK / "synthetic-out")
        rows.append({"blocks": blocks, "width": a.width, "peak_bytes": peak, "seconds": seconds})
        print(f"{blocks:3d} blocks of width {a.width}: peak anonymous memory {peak / 2**20:7.0f} MiB, {seconds:.0f} s", flush=True)
        record("memory", rows)
    print(f"largest over smallest: {max(r['peak_bytes'] for r in rows) / min(r['peak_bytes'] for r in rows):.3f}")


if __name__ == "__main__":
    main()
