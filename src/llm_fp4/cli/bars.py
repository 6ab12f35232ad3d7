"""Progress for people: bars with remaining time on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

SHORT = 2.0  # seconds: what takes less is not worth a line that stays
BETWEEN_LINES = 15.0  # seconds


@dataclass
class Stage:
    """One stage's progress: the first call's ``done`` is where this run began, a continued one beyond 0."""

    began: float
    first: int
    done: int
    total: int
    updated: float

    def remaining(self, now: float) -> float | None:
        """Return the seconds left at the average rate so far; None before anything is done."""
        if self.done <= self.first:
            return None
        rate = (self.updated - self.began) / (self.done - self.first)
        return max(0.0, rate * (self.total - self.done) - (now - self.updated))


def span(seconds: float) -> str:
    """Return a duration for people.

    >>> span(7), span(75), span(4000)
    ('0:07', '1:15', '1:06:40')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Bars:
    """A bar a stage, drawn on stderr; the bars of short stages go when they are full."""

    def __init__(self) -> None:
        self._stages: dict[str, Stage] = {}
        self._tasks: dict[str, TaskID] = {}
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            _Remaining(self._stages),
        )
        self._bars = Progress(*columns, console=Console(stderr=True))

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        known = _advance(self._stages, stage, done, total, now)
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=None, count="")
        task = self._tasks[stage]
        pulsing = total <= 1 and done < total  # one step: how long it takes is not known
        self._bars.update(task, completed=done, total=None if pulsing else total, count="" if total <= 1 else f"{done:,}/{total:,}")
        if done >= total:
            self._bars.stop_task(task)
            if now - known.began < SHORT:
                self._bars.remove_task(task)
            del self._tasks[stage], self._stages[stage]


class _Remaining(ProgressColumn):
    def __init__(self, stages: dict[str, Stage]) -> None:
        super().__init__()
        self._stages = stages

    def render(self, task: Task) -> Text:
        stage = self._stages.get(task.description)
        left = stage.remaining(time.monotonic()) if stage else None
        return Text("" if left is None else f"{span(left)} left")


class Lines:
    """A line at most every 15 seconds and one at the end of every stage that took a while, for logs."""

    def __init__(self, write: Callable[[str], object] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stages: dict[str, Stage] = {}
        self._write, self._clock, self._last = write or _to_stderr, clock, clock()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = self._clock()
        known = _advance(self._stages, stage, done, total, now)
        if done >= total:
            if now - known.began >= SHORT:
                self._write(f"{stage}: done in {span(now - known.began)}")
            del self._stages[stage]
        elif now - self._last >= BETWEEN_LINES and done > known.first:
            self._last, left = now, known.remaining(now)
            self._write(f"{stage}: {done:,}/{total:,}" + ("" if left is None else f", about {span(left)} left"))


def _advance(stages: dict[str, Stage], name: str, done: int, total: int, now: float) -> Stage:
    """Return the stage called ``name`` after a call; one that goes back begins again."""
    stage = stages.get(name)
    if stage is None or done < stage.done:
        stage = stages[name] = Stage(now, done, done, total, now)
    if done > stage.done:
        stage.done, stage.updated = done, now
    stage.total = total
    return stage


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
