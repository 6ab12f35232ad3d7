"""The prefix before every sequence, in one line."""

from __future__ import annotations

from typing import Any


def prefix_line(prefix: dict[str, Any] | None) -> str:
    """Return what people are told about a prefix; empty where none is wanted."""
    if prefix is None:
        return ""
    if "most" in prefix:
        return f"up to {prefix['most']} tokens before every sequence, as attention sinks"
    if not prefix["tokens"]:
        return str(prefix["reason"])
    left = {len(t["tokens"]): t["outlying"] for t in prefix["tried"]}
    now, ids = left[len(prefix["tokens"])], " ".join(map(str, prefix["tokens"]))
    what = "tokens" if len(prefix["tokens"]) > 1 else "token"
    return f"{what} {ids} before every sequence: {now} of {prefix['tried'][0]['sequences']} sequences have an outlying token, {left[0]} without it"
