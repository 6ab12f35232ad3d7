"""Results on stdout: a JSON object, or tables for people."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

WIDE = 200  # columns where stdout is no terminal, so that nothing is cut


def print_json(data: dict[str, Any]) -> None:
    """Print ``data`` as one JSON object; NaN and infinity, which JSON cannot spell, become null."""
    print(json.dumps(_finite(data), indent=1, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> None:
    """Print ``rows`` under ``columns``, numbers to the right."""
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    numeric = [all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(columns))]
    for name, right in zip(columns, numeric, strict=True):
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell(value) for value in row))
    terminal = sys.stdout.isatty()
    Console(file=sys.stdout, markup=False, highlight=False, width=None if terminal else WIDE).print(table)


def print_facts(facts: Sequence[tuple[str, Any]]) -> None:
    """Print lines of a name and its value."""
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        print(f"{name:<{width}}  {cell(value)}")


def cell(value: Any) -> str:
    """Return the text of one value: four significant digits, thousands grouped, nothing for None.

    >>> cell(1234567), cell(0.0123456), cell(None), cell(1e-9), cell(123456.7)
    ('1,234,567', '0.01235', '', '1e-09', '123,457')
    """
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def size(count: int | None) -> str:
    """Return a number of bytes for people.

    >>> size(999), size(143_056), size(None)
    ('999 B', '143.1 kB', 'unknown')
    """
    if count is None:
        return "unknown"
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {k: _finite(v) for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(v) for v in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
