"""What a failure looks like: one sentence on stderr and an exit code; a traceback only with LLM_FP4_DEBUG=1."""

from __future__ import annotations

import os
from typing import Any

import typer
from typer.core import TyperGroup

from llm_fp4 import ranks
from llm_fp4.errors import LlmFp4Error
from llm_fp4.storage import output_error

INTERRUPTED = 130  # 128 + SIGINT, as shells count


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a command that has something to say about it."""


class Commands(TyperGroup):
    """The group of commands, which turns their failures into sentences."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except (Exception, KeyboardInterrupt) as error:
            if hasattr(error, "show"):  # a usage error, which typer shows itself
                raise
            if debugging():
                raise
            raise typer.Exit(report(error)) from None


def debugging() -> bool:
    """Return whether the user wants tracebacks."""
    return os.environ.get("LLM_FP4_DEBUG", "") not in ("", "0")


def report(error: BaseException) -> int:
    """Write the sentence of ``error`` to stderr, once for all ranks of a run, and return the exit code."""
    sentence, code = describe(error)
    if ranks.speaks():
        typer.echo(f"llm-fp4: {' '.join(sentence.split())}", err=True)
    return code


def describe(error: BaseException) -> tuple[str, int]:
    """Return one sentence that says what happened and what to do, and the exit code."""
    text = str(error).strip()
    if isinstance(error, LlmFp4Error):
        return text, error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return text or "interrupted", INTERRUPTED
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return (
            "not enough memory; close other programs, use fewer or shorter sequences (--sequences, --length), or a larger machine",
            1,
        )
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}; check the path and its permissions", 1
    if isinstance(error, OSError) and error.errno is not None:
        return str(output_error(error, _somewhere())), 1
    first = text.splitlines()[0] if text else "no message"
    return f"unexpected {type(error).__name__}: {first[:300]}; LLM_FP4_DEBUG=1 shows where, please report it", 1


def _somewhere() -> Any:
    from pathlib import Path

    return Path("a file")
