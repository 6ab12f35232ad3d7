"""A run killed at ten random moments and resumed each time, against one that was left alone: the same bytes?

    python benchmarks/resume.py [--kills 10]

Quantizes the LLaMA that the tests' random factory would make, wider, and kills it with SIGKILL.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import WORK, record
from transformers import LlamaConfig, LlamaForCausalLM

RUN = """
import sys, torch, llm_fp4
tokens = torch.randint(0, 2000, (8, 128), generator=torch.Generator().manual_seed(0))
llm_fp4.quantize(sys.argv[1], sys.argv[2], "fpq-gptq", tokens=tokens)
"""


def digest(folder: Path) -> str:
    """Return one digest over the names and bytes of all files."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--kills", type=int, default=10)
    arguments.add_argument("--seed", type=int, default=0)
    a = arguments.parse_args()
    folder = WORK / "resume"
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2000, hidden_size=256, intermediate_size=704, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(folder / "float")
    command = [sys.executable, "-c", RUN, str(folder / "float")]
    start = time.perf_counter()
    subprocess.run([*command, str(folder / "whole")], check=True)
    seconds = time.perf_counter() - start
    chance, killed, starts = random.Random(a.seed), 0, 0
    out = folder / "killed"
    while not out.exists():
        starts += 1
        process = subprocess.Popen([*command, str(out)])
        # moments spread over the whole run; import and start-up are part of it
        wait = chance.uniform(0.3, 1.0) * seconds if killed < a.kills else None
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
        if killed < a.kills and out.exists():  # it finished before all kills: begin again, the digests must agree all the same
            assert digest(out) == digest(folder / "whole")
            shutil.rmtree(out)
    same = digest(out) == digest(folder / "whole")
    print(f"killed {killed} times, started {starts} times: {'the same bytes' if same else 'DIFFERENT BYTES'}")
    record("resume", [{"kills": killed, "starts": starts, "same_bytes": same, "seconds_uninterrupted": seconds}])
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
