"""A saved tiny model, a checkpoint of it, and the command line run in this process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llm_fp4.cli.main import app

QUICK = ["--sequences", "2", "--length", "32", "--rounds", "1", "--quiet"]
WORDS = "The sea is wide and the ship sails on it, said the captain of old. "


@pytest.fixture
def llm_fp4() -> Callable[..., Any]:
    """Return a function that runs the command line: ``llm_fp4("quantize", src, out)`` gives exit_code, stdout and stderr."""
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def refused(llm_fp4: Callable[..., Any]) -> Callable[..., str]:
    """Return a function that runs a command which must fail with one sentence, and returns that sentence."""

    def run(*arguments: Any, code: int = 1) -> str:
        result = llm_fp4(*arguments)
        assert result.exit_code == code, result.output
        assert result.stdout == ""
        lines = result.stderr.strip().splitlines()
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("llm-fp4: ")
        assert "unexpected" not in lines[0]
        return lines[0]

    return run


@pytest.fixture
def save(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> Callable[..., Path]:
    """Return a function that saves a tiny LLaMA with its tokenizer: ``save(name="source", shard_size="5GB", **config)``."""

    def write(name: str = "source", shard_size: str = "5GB", **config: Any) -> Path:
        folder = tmp_path / name
        tiny_llama(**config).save_pretrained(folder, max_shard_size=shard_size)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return write


@pytest.fixture
def source(save: Callable[..., Path]) -> Path:
    """Return a saved float model."""
    return save()


@pytest.fixture
def checkpoint(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, llm_fp4: Any, request: pytest.FixtureRequest) -> Path:
    """Return a copy of a checkpoint that is quantized once a session."""
    kept = tmp_path_factory.getbasetemp() / "checkpoint"
    if not kept.exists():
        result = llm_fp4("quantize", request.getfixturevalue("source"), kept, *QUICK)
        assert result.exit_code == 0, result.output
    return Path(shutil.copytree(kept, tmp_path / "quantized"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Return a text file of some 6,000 tokens."""
    path = tmp_path / "text.txt"
    path.write_text(WORDS * 90)
    return path
