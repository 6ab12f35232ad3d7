"""Giving memory back between two units, so that its peak does not depend on their number."""

from __future__ import annotations

import ctypes
import gc
from functools import lru_cache
from typing import Any


def settle() -> None:
    """Free what a finished unit left: modules and hooks that refer to each other, then pages the C library keeps for later.

    glibc raises its limit for memory of its own mappings as large tensors are freed; later ones then come from a heap that
    fragments a little more with every block.
    """
    gc.collect()
    if (trim := _trim()) is not None:
        trim(0)


@lru_cache(maxsize=1)
def _trim() -> Any:
    """Return glibc's ``malloc_trim``, or None under another C library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
