"""How progress and failures are told."""

from __future__ import annotations

import errno
import io
from typing import Any

import pytest
from rich.console import Console

from llm_fp4.cli import bars
from llm_fp4.cli.bars import Bars, Lines, Stage
from llm_fp4.cli.failures import describe
from llm_fp4.cli.render import print_json
from llm_fp4.errors import OutputError, RecipeError


def test_remaining_time_is_the_average_so_far() -> None:
    stage = Stage(began=100, first=2, done=4, total=10, updated=110)  # two units took 10 s; six are left
    assert stage.remaining(now=110) == 30
    assert stage.remaining(now=115) == 25
    assert stage.remaining(now=500) == 0
    assert Stage(100, 2, 2, 10, 100).remaining(now=120) is None  # a continued run tells nothing before its first unit


def lines_of(calls: list[tuple[float, int]], total: int = 100) -> list[str]:
    written: list[str] = []
    now = [0.0]
    lines = Lines(written.append, lambda: now[0])
    for seconds, done in calls:
        now[0] = seconds
        lines("quantize", done, total)
    return written


def test_lines_are_sparse() -> None:
    assert lines_of([(second, second) for second in range(41)]) == [
        "quantize: 15/100, about 1:25 left",
        "quantize: 30/100, about 1:10 left",
    ]


def test_short_stages_are_not_told() -> None:
    assert lines_of([(0, 0), (1, 100)]) == []
    assert lines_of([(0, 0), (3, 100)]) == ["quantize: done in 0:03"]


def test_a_stage_may_begin_again() -> None:
    assert lines_of([(0, 0), (10, 50), (11, 0), (21, 50)]) == ["quantize: 50/100, about 0:10 left"]


def drawn(monkeypatch: pytest.MonkeyPatch, calls: list[tuple[float, str, int, int]]) -> str:
    now = [0.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    screen = io.StringIO()
    monkeypatch.setattr(bars, "Console", lambda stderr: Console(file=screen, force_terminal=True, width=120))
    with Bars() as shown:
        shown._bars.get_time = lambda: now[0]
        for seconds, stage, done, total in calls:
            now[0] = seconds
            shown(stage, done, total)
            shown._bars.refresh()
    return screen.getvalue()


def test_bars_show_the_remaining_time(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = drawn(monkeypatch, [(0, "quantize", 4, 10), (10, "quantize", 5, 10)])
    assert "quantize" in screen
    assert "5/10" in screen
    assert "0:50 left" in screen


def test_bars_of_short_stages_go(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [(0.0, "read text", 0, 9), (1.0, "read text", 9, 9), (1.0, "quantize", 0, 2), (9.0, "quantize", 2, 2)]
    last = drawn(monkeypatch, calls).rpartition("\x1b[2K")[2]
    assert "quantize" in last
    assert "read text" not in last


@pytest.mark.parametrize(
    ("error", "words", "code"),
    [
        (RecipeError("no such recipe"), "no such recipe", 2),
        (OutputError("the disk is full"), "the disk is full", 1),
        (KeyboardInterrupt(), "interrupted", 130),
        (MemoryError(), "not enough memory", 1),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"), "not enough memory", 1),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "not enough memory", 1),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full", 1),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), "/root/x: Permission denied", 1),
        (TypeError("a bug\nwith lines"), "unexpected TypeError: a bug; LLM_FP4_DEBUG=1", 1),
    ],
)
def test_every_failure_is_one_sentence(error: BaseException, words: str, code: int) -> None:
    sentence, exit_code = describe(error)
    assert words in sentence
    assert exit_code == code


def test_json_spells_no_infinity(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    data: dict[str, Any] = {"perplexity": float("inf"), "kl": [float("nan"), 1.5], "n": 3}
    print_json(data)
    assert json.loads(capsys.readouterr().out) == {"perplexity": None, "kl": [None, 1.5], "n": 3}
