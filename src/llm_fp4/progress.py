"""How long work tells its progress to whoever renders it; the library itself prints nothing."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called as ``progress(stage, done, total)``: ``done`` of ``total`` units of the named stage are finished."""


def silent(stage: str, done: int, total: int) -> None:
    """Report nothing."""
