"""Giving memory back between two sites and two units, so that its peak does not depend on their number."""

from __future__ import annotations

import ctypes
import gc
from functools import lru_cache
from typing import Any


def settle() -> None:
    """Free what a finished unit left: modules and hooks that refer to each other, then what :func:`trim` gives back."""
    gc.collect()
    trim()


def trim() -> None:
    """Give back the pages that the C library keeps for later.

    glibc raises its limit for memory of its own mappings as large tensors are freed; later ones then come from a heap that
    fragments, here more and there less, as one site's matrices follow another's.
    """
    if (release := _trim()) is not None:
        release(0)


@lru_cache(maxsize=1)
def _trim() -> Any:
    """Return glibc's ``malloc_trim``, or None under another C library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
