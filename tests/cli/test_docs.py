"""docs/cli.md says what ``--help`` says; how typer lays it out may differ between its versions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_group

from llm_fp4.cli.main import app

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
COMMANDS = get_group(app).commands
HINT = "run python docs/generate_cli.py"


def words(text: str) -> str:
    return " ".join(text.replace("\b", "").split())


def sections() -> dict[str, str]:
    parts = re.split(r"^## llm-fp4 ?(\S*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_command_is_there() -> None:
    assert (
        set(sections())
        == {"", *COMMANDS}
        == {"", "quantize", "eval", "generate", "inspect", "bench", "export", "doctor", "recipes"}
    ), HINT


@pytest.mark.parametrize("name", list(COMMANDS))
def test_the_command_reference_is_current(name: str) -> None:
    command, section = COMMANDS[name], words(sections()[name])
    assert words(command.help) in section, HINT
    for parameter in command.params:
        assert words(parameter.help or "") in section, HINT
        assert all(option in section for option in parameter.opts if option.startswith("-")), HINT
    options = {o for parameter in command.params for o in parameter.opts} | {"--help"}
    listed = re.findall(r"^ +(?:-\w, )?(--[a-z-]+)", sections()[name].partition("Options:")[2], flags=re.MULTILINE)
    assert len(listed) > 2
    assert set(listed) == {o for o in options if o.startswith("--")}, HINT
