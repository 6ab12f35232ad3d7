"""Ctrl-C and full disks: finished blocks are kept, the same command continues, and the bytes are those of one run."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_fp4.storage import write

QUICK = ["--sequences", "2", "--length", "32", "--rounds", "1", "--quiet"]


def same_bytes(one: Path, other: Path) -> bool:
    files = [sorted(p.name for p in folder.iterdir()) for folder in (one, other)]
    return files[0] == files[1] and all((one / name).read_bytes() == (other / name).read_bytes() for name in files[0])


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Return a function that makes Ctrl-C strike when ``stage`` has done ``done``; a ``done`` of -1 undoes it."""

    def at(stage: str, done: int) -> None:
        def progress(now: str, so_far: int, total: int) -> None:
            if (now, so_far) == (stage, done):
                raise KeyboardInterrupt

        monkeypatch.setattr("llm_fp4.cli.working.silent", progress)

    return at


@pytest.mark.parametrize(("stage", "done"), [("quantize", 0), ("quantize", 1), ("quantize", 3), ("quantize", 4)])
def test_interrupted_and_continued(llm_fp4: Any, source: Path, tmp_path: Path, interrupt: Any, stage: str, done: int) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert llm_fp4("quantize", source, whole, *QUICK).exit_code == 0
    interrupt(stage, done)
    result = llm_fp4("quantize", source, out, *QUICK)
    assert result.exit_code == 130
    assert result.stdout == ""
    assert result.stderr == "llm-fp4: interrupted; finished blocks are kept, and the same command continues after them\n"
    assert not out.exists()
    assert len(list((tmp_path / "out.partial" / "checkpoint").glob("*.safetensors"))) == done
    interrupt(stage, -1)
    assert llm_fp4("quantize", source, out, *QUICK).exit_code == 0
    assert same_bytes(whole, out)
    assert not (tmp_path / "out.partial").exists()


def test_interrupted_before_anything_is_finished_leaves_nothing(llm_fp4: Any, source: Path, tmp_path: Path, interrupt: Any) -> None:
    interrupt("write calibration text", 10)
    assert llm_fp4("quantize", source, tmp_path / "out", *QUICK).exit_code == 130
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_another_recipe_does_not_continue(llm_fp4: Any, refused: Any, source: Path, tmp_path: Path, interrupt: Any) -> None:
    interrupt("quantize", 2)
    assert llm_fp4("quantize", source, tmp_path / "out", *QUICK).exit_code == 130
    interrupt("quantize", -1)
    assert "unfinished run with another recipe" in refused("quantize", source, tmp_path / "out", "--bits", "4/4/8", *QUICK)
    assert llm_fp4("quantize", source, tmp_path / "out", *QUICK).exit_code == 0


def test_damaged_state_is_named(llm_fp4: Any, refused: Any, source: Path, tmp_path: Path, interrupt: Any) -> None:
    interrupt("quantize", 2)
    assert llm_fp4("quantize", source, tmp_path / "out", *QUICK).exit_code == 130
    (tmp_path / "out.partial" / "run.json").write_text("{")
    assert "run.json is damaged" in refused("quantize", source, tmp_path / "out", *QUICK)


def test_interrupted_while_generating(llm_fp4: Any, checkpoint: Path, interrupt: Any) -> None:
    interrupt("load the model", 1)
    result = llm_fp4("generate", checkpoint, "The sea", "--quiet")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "llm-fp4: interrupted\n")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_disk_full(llm_fp4: Any, refused: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    whole, out, save = tmp_path / "whole", tmp_path / "out", write.save_file
    assert llm_fp4("quantize", source, whole, *QUICK).exit_code == 0

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        if "model-00003" in path.name:
            path.write_bytes(b"half")  # what a full disk leaves
            raise OSError(number, os.strerror(number))
        save(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(write, "save_file", full)
        sentence = refused("quantize", source, out, *QUICK)
    assert "the disk is full" in sentence
    assert "model-00003-of-00004.safetensors" in sentence
    assert "finished blocks are kept" in sentence
    assert not out.exists()
    kept = sorted(p.name for p in (tmp_path / "out.partial" / "checkpoint").iterdir())
    assert kept == ["model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"]
    assert llm_fp4("quantize", source, out, *QUICK).exit_code == 0
    assert same_bytes(whole, out)


def run(*arguments: Any, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line as its own process."""
    return subprocess.run(
        [sys.executable, "-m", "llm_fp4", *map(str, arguments)], capture_output=True, text=True, timeout=120, **more
    )


def test_file_size_limit(llm_fp4: Any, source: Path, tmp_path: Path, text: Path) -> None:
    out, quick = tmp_path / "out", ["--sequences", "1", "--length", "16", "--rounds", "1", "--calibration", text, "--quiet"]
    # the first unit's shard has some 5,400 bytes, that of a block 9,200
    limit = run(
        "quantize",
        source,
        out,
        *quick,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (7000, resource.RLIM_INFINITY)),
    )
    assert limit.returncode == 1
    assert len(limit.stderr.splitlines()) == 1
    assert "model-00002-of-00004.safetensors was not written" in limit.stderr
    assert "ulimit -f" in limit.stderr
    assert not out.exists()
    assert [p.name for p in (tmp_path / "out.partial" / "checkpoint").iterdir()] == ["model-00001-of-00004.safetensors"]
    for folder in (out, tmp_path / "whole"):
        assert llm_fp4("quantize", source, folder, *quick).exit_code == 0
    assert same_bytes(tmp_path / "whole", out)


def test_a_real_ctrl_c(llm_fp4: Any, save: Callable[..., Path], tmp_path: Path, text: Path) -> None:
    source, out = save(num_hidden_layers=12), tmp_path / "out"
    arguments = ["quantize", source, out, "--sequences", "8", "--length", "64", "--rounds", "1", "--calibration", text, "--quiet"]
    command = [sys.executable, "-m", "llm_fp4", *map(str, arguments)]
    # the tests may themselves run in the background of a script, where Ctrl-C is ignored
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    progress = tmp_path / "out.partial" / "state" / "progress.json"
    for _ in range(60_000):
        if progress.exists() or process.poll() is not None:
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    assert (
        stderr.strip().splitlines()[-1]
        == "llm-fp4: interrupted; finished blocks are kept, and the same command continues after them"
    )
    assert "Traceback" not in stderr
    assert not out.exists()
    kept = len(list((tmp_path / "out.partial" / "checkpoint").glob("*.safetensors")))
    assert 1 <= kept < 14
    assert llm_fp4(*arguments).exit_code == 0
    assert len(list(out.glob("*.safetensors"))) == 14
