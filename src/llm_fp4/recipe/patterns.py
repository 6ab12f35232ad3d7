"""Patterns that select modules by name."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from llm_fp4.errors import RecipeError


def matches(pattern: str, name: str) -> bool:
    """Return whether ``pattern`` selects module ``name``.

    "re:REGEX" must match the whole name; otherwise a glob over the whole name or over its last parts.

    Raises:
        RecipeError: the regex is none.

    >>> matches("down_proj", "model.layers.3.mlp.down_proj"), matches("model.layers.1.*", "model.layers.12.mlp")
    (True, False)
    """
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise RecipeError(
                f"pattern {pattern!r} is no regular expression ({error}); write a name, a glob, or re:REGEX"
            ) from None
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
