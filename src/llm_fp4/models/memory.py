"""Giving memory back, so that the peak of a run does not depend on how many blocks it has."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

_MMAP_THRESHOLD = -3  # of glibc's mallopt
_LARGE = 16 << 20  # bytes; with less, small models spend much of a run on page faults


def steady() -> None:
    """Let every large tensor of this process be a mapping of its own, which goes back as soon as it is freed.

    glibc raises its limit for such mappings as large tensors are freed; later ones then come from a heap that fragments by
    chance, and the peak within one block varies by a third. Call it before a model is built: what is built without weights makes
    each of them for a moment, which leaves gigabytes of holes in the heap, and holes are filled whatever the limit is.
    """
    if (limit := _glibc("mallopt")) is not None:
        limit(_MMAP_THRESHOLD, _LARGE)


@contextmanager
def only_new_garbage() -> Iterator[None]:
    """Let :func:`settle` look through what was made since the block began, not through every object of every library."""
    mine = gc.get_freeze_count() == 0
    if mine:
        gc.collect()
        gc.freeze()
    try:
        yield
    finally:
        if mine:
            gc.unfreeze()


def settle() -> None:
    """Free what a finished unit left: modules and hooks that refer to each other, then pages the C library keeps for later."""
    gc.collect()
    if (trim := _glibc("malloc_trim")) is not None:
        trim(0)


@lru_cache
def _glibc(name: str) -> Any:
    """Return a function of glibc's, or None under another C library."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):
        return None
