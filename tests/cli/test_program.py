"""The program as its own process: stdout, stderr, exit codes; and that it starts fast."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from llm_fp4 import __version__


def run(*arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llm_fp4", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment)


def test_json_is_all_there_is_on_stdout(source: Path, tmp_path: Path) -> None:
    done = run("quantize", source, tmp_path / "out", "--sequences", "2", "--length", "32", "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["layers"] == 16
    assert "\x1b" not in done.stderr  # no bars where stderr is no terminal
    assert len(done.stderr.splitlines()) < 8


def test_errors_go_to_stderr_without_a_traceback(tmp_path: Path) -> None:
    done = run("quantize", tmp_path / "nowhere", tmp_path / "out", "--quiet")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("llm-fp4: ")
    assert len(done.stderr.splitlines()) == 1
    assert run("recipes", "nothing").returncode == 2
    assert "Traceback" in run("recipes", "nothing", LLM_FP4_DEBUG="1").stderr


def test_the_program_starts_without_transformers() -> None:
    check = "import sys; from llm_fp4.cli.main import app; app(['--version'], standalone_mode=False); assert 'transformers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"llm-fp4 {__version__}\n"


def test_a_closed_pipe_is_no_traceback() -> None:
    done = subprocess.run(
        f"{sys.executable} -m llm_fp4 recipes fpq | true", shell=True, capture_output=True, text=True, timeout=120
    )
    assert "Traceback" not in done.stderr
