"""Several processes on one run: every piece is somebody's, and the bytes are those of one process."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import llm_fp4
from llm_fp4 import ranks

ARGUMENTS = ["--recipe", "fpq-gptq", "--rounds", "1", "--sequences", "20", "--length", "256"]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [1, 31, 96, 1000, 70000])
def test_every_piece_is_of_one_rank(monkeypatch: pytest.MonkeyPatch, size: int, rows: int) -> None:
    monkeypatch.setattr(ranks._group, "size", size)
    found = []
    for rank in range(size):
        monkeypatch.setattr(ranks._group, "rank", rank)
        found += [(piece.start, piece.stop) for piece in ranks.own(rows, 2048)]
    assert sorted(found) == [(piece.start, piece.stop) for piece in ranks.pieces(rows, 2048)]
    ends = [0, *(stop for _, stop in sorted(found))]
    assert [start for start, _ in sorted(found)] == ends[:-1]
    assert ends[-1] == rows


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def float_model(tmp_path: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> list[str]:
    """Return the arguments that name a tied model, wide enough to be cut into pieces, and its calibration text."""
    folder = tmp_path / "float"
    tiny_llama(hidden_size=64, intermediate_size=160, tie_word_embeddings=True).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    letters = torch.randint(97, 123, (8000,), generator=torch.Generator().manual_seed(0))
    (tmp_path / "text.txt").write_text("".join(map(chr, letters.tolist())))
    return [str(folder), "--calibration", str(tmp_path / "text.txt")]


def start(ranks: int, arguments: list[str], program: tuple[str, ...] = ("-m", "llm_fp4")) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*launcher, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def kill_rank(launcher: subprocess.Popen[str], rank: int, partial: Path) -> None:
    """Kill a rank with SIGKILL once the first unit is finished."""
    while not (partial / "state" / "plan-00000.json").is_file():
        assert launcher.poll() is None, launcher.communicate()[1]
        time.sleep(0.005)
    (victim,) = [p for p in psutil.Process(launcher.pid).children() if p.environ().get("RANK") == str(rank)]
    victim.send_signal(signal.SIGKILL)


@pytest.mark.usefixtures("one_thread")
def test_ranks_write_the_bytes_of_one_process_and_go_on_after_one_was_killed(tmp_path: Path, float_model: list[str]) -> None:
    source, *calibration = float_model
    alone, together, killed = (tmp_path / name for name in ("alone", "together", "killed"))
    recipe = llm_fp4.load_recipe("fpq-gptq").model_dump()
    recipe["search"]["rounds"] = 1
    recipe["calibration"] = {"source": calibration[1], "sequences": 20, "length": 256}
    llm_fp4.quantize(source, alone, llm_fp4.Recipe.model_validate(recipe))

    two = start(2, ["quantize", source, str(together), *calibration, *ARGUMENTS])
    printed, told = two.communicate(timeout=300)
    assert two.returncode == 0, told
    assert printed.count("checkpoint") == 1  # by one rank
    assert digest(together) == digest(alone)

    broken = start(2, ["quantize", source, str(killed), *calibration, *ARGUMENTS])
    kill_rank(broken, 1, killed.with_name("killed.partial"))
    _, told = broken.communicate(timeout=300)
    assert broken.returncode != 0
    assert [line for line in told.splitlines() if line.startswith("llm-fp4:")] == [
        "llm-fp4: one of the 2 processes ended, so this run stops; run the same command again, with any number of processes: "
        "finished blocks are kept"
    ], told
    assert not killed.exists()

    three = start(3, ["quantize", source, str(killed), *calibration, *ARGUMENTS])
    _, told = three.communicate(timeout=300)
    assert three.returncode == 0, told
    assert digest(killed) == digest(alone)


OTHERWISE = """
import os, runpy
import torch
from llm_fp4.pipeline.steps import BlockSteps

descend = BlockSteps.loss

def other_order(self, step):  # as on a GPU, where sums come out a little differently
    return descend(self, step) * (1 + 0.3 * int(os.environ["RANK"]) * torch.rand(()))

BlockSteps.loss = other_order
runpy.run_module("llm_fp4", run_name="__main__")
"""


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "rules",
    [
        {"search": {"rounds": 1, "reconstruction": "block", "reconstruction_epochs": 2}},
        {"search": {"rounds": 1}, "inputs": {"granularity": "per_token"}, "transforms": {"learned": True, "epochs": 2}},
    ],
    ids=["rounding", "maps"],
)
def test_what_is_learned_is_the_first_ranks(tmp_path: Path, float_model: list[str], rules: dict[str, Any]) -> None:
    source, _, text = float_model
    recipe = llm_fp4.Recipe.model_validate({**rules, "calibration": {"source": text, "sequences": 10, "length": 256}})
    alone, together, program = tmp_path / "alone", tmp_path / "together", tmp_path / "otherwise.py"
    llm_fp4.quantize(source, alone, recipe)
    wish = tmp_path / "wish.yaml"
    wish.write_text((alone / "recipe.yaml").read_text())
    program.write_text(OTHERWISE)
    two = start(2, ["quantize", source, str(together), "--recipe", str(wish)], (str(program),))
    _, told = two.communicate(timeout=300)
    assert two.returncode == 0, told
    assert digest(together) == digest(alone)


def test_a_failure_is_told_once(tmp_path: Path, float_model: list[str]) -> None:
    (tmp_path / "out").mkdir()
    failing = start(2, ["quantize", float_model[0], str(tmp_path / "out")])
    _, told = failing.communicate(timeout=300)
    assert failing.returncode != 0
    assert [line for line in told.splitlines() if line.startswith("llm-fp4:")] == [
        f"llm-fp4: {tmp_path / 'out'} exists already; remove it or choose another output"
    ]
