"""One model quantized by one process and by two: the same bytes, in what time?

    python benchmarks/ranks.py [--ranks 2] [--blocks 8] [--width 1024]

First, how matrix products scale on this machine: one process pinned to one core, then one on each of as many cores as ranks. Then
a random LLaMA is quantized with one thread a process by `fpq` in one round, on 4,096 tokens. Seconds are those of the whole command,
start-up included; ``--formats e2m1`` searches one format alone, which leaves more of the time to what every rank does.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import WORK, record
from memory import synthetic
from resume import digest

import llm_fp4
from llm_fp4 import ranks
from llm_fp4.recipe import Recipe

PRODUCT = """
import os, sys, time, torch
os.sched_setaffinity(0, {int(sys.argv[1])})
torch.set_num_threads(1)
a = torch.randn(1024, 1024)
for _ in range(5): a @ a
input()
count, began = 0, time.perf_counter()
while time.perf_counter() - began < 5:
    a @ a
    count += 1
print(count * 2 * 1024**3 / (time.perf_counter() - began))
"""


def products(cores: list[int]) -> float:
    """Return the float32 operations a second of as many pinned processes as ``cores``, all together."""
    started = [
        subprocess.Popen([sys.executable, "-c", PRODUCT, str(c)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for c in cores
    ]
    time.sleep(8)  # until all have loaded torch
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    return sum(float(process.communicate()[0]) for process in started)


def work(source: str, out: str, formats: list[str]) -> None:
    """Quantize as one of the ranks."""
    tokens = torch.randint(0, 1000, (8, 512), generator=torch.Generator().manual_seed(0))
    rule = {"formats": formats} if formats else {}
    recipe = Recipe.model_validate({"weights": rule, "inputs": rule, "search": {"rounds": 1}})
    with ranks.joined("cpu"):
        llm_fp4.quantize(source, out, recipe, tokens=tokens)


def run(source: Path, out: Path, count: int, formats: list[str]) -> float:
    """Return the seconds that ``count`` ranks take."""
    for folder in (out, out.with_name(f"{out.name}.partial")):
        shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), __file__, "--work"]
    began = time.perf_counter()
    subprocess.run([*command, str(source), str(out), "--formats", *formats], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return time.perf_counter() - began


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--ranks", type=int, default=2)
    arguments.add_argument("--blocks", type=int, default=8)
    arguments.add_argument("--width", type=int, default=1024)
    arguments.add_argument("--formats", nargs="*", default=[], help="instead of all of the width")
    arguments.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    a = arguments.parse_args()
    if a.work:
        work(*a.work, a.formats)
        return
    cores = sorted(os.sched_getaffinity(0))[: a.ranks]
    one, all_together = products(cores[:1]), products(cores)
    print(f"float32 products: {one / 1e9:.0f} GFLOP/s on one core, {all_together / 1e9:.0f} on {len(cores)}", flush=True)
    source = WORK / f"synthetic-{a.width}-{a.blocks}"
    synthetic(source, a.blocks, a.width)
    seconds = {}
    for count in (1, a.ranks):
        seconds[count] = run(source, WORK / f"ranks-{count}", count, a.formats)
        print(f"{count} ranks: {seconds[count]:.1f} s", flush=True)
    same = digest(WORK / "ranks-1") == digest(WORK / f"ranks-{a.ranks}")
    ratio = seconds[a.ranks] / seconds[1]
    print(f"{a.ranks} ranks take {ratio:.3f} of the time of one; {'the same bytes' if same else 'DIFFERENT BYTES'}")
    rows = {
        "width": a.width,
        "blocks": a.blocks,
        "formats": a.formats or "all",
        "ranks": a.ranks,
        "seconds_alone": seconds[1],
        "seconds": seconds[a.ranks],
    }
    record("ranks", [{**rows, "ratio": ratio, "same_bytes": same, "products_scale": all_together / one}])
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
