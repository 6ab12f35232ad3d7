"""Write docs/cli.md from the ``--help`` of every command: ``python docs/generate_cli.py``."""

from __future__ import annotations

import os
from pathlib import Path

from typer.main import get_command
from typer.testing import CliRunner

from llm_fp4.cli.main import app

PAGE = Path(__file__).with_name("cli.md")
HEAD = """# The command line

Written by `docs/generate_cli.py` from `--help`; do not edit. Nearly all of it has a call in `llm_fp4.api`:
`quantize`, `evaluate`, `judge_images`, `generate_text`, `inspect_model`, `benchmark`, `export`, `diagnose`, `estimate` and others.
"""


def page() -> str:
    """Return the text of docs/cli.md."""
    parts = [HEAD]
    for name in ["", *get_command(app).commands]:  # type: ignore[attr-defined]
        arguments = [name] if name else []
        shown = CliRunner().invoke(
            app, [*arguments, "--help"], prog_name="llm-fp4", env={**os.environ, "COLUMNS": "100"}, terminal_width=100
        )
        lines = "\n".join(line.rstrip() for line in shown.stdout.strip().splitlines())
        parts.append(f"## llm-fp4{' ' if name else ''}{name}\n\n```text\n{lines}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
