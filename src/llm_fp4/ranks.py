"""Several processes on one run: which part of the work is whose, and how the parts come together. Alone, all of it is one's own.

Rows are cut into pieces by their number alone, one rank computes a piece whole, and bringing pieces together adds nothing to
them, so no byte of a result depends on how many ranks there are. All ranks see one file system: the first writes while the others
wait, but for the rows and outputs of calibration batches, which each rank writes for its own batches.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from llm_fp4.errors import RankError

_PIECES = 8  # of anything that is cut: 2, 4 and 8 ranks share them evenly
_STEP = 32  # rows of a piece are a multiple: whole vector registers, so a row's neighbours do not matter in elementwise loops
_PATIENCE = timedelta(days=1)  # a rank that died closes its connections at once; one that lives may have much to do


class _Group:
    """The ranks of this run; one until :func:`joined`."""

    rank, size, local = 0, 1, 0
    store: Any = None


_group = _Group()


def alone() -> bool:
    """Return whether there is one rank."""
    return _group.size == 1


def number() -> int:
    """Return the number of this rank."""
    return _group.rank


def leads() -> bool:
    """Return whether this is the rank that writes, reports and prints."""
    return _group.rank == 0


def device_number() -> int | None:
    """Return the number of this rank's GPU on its machine, or None alone."""
    return _group.local if _group.size > 1 else None


def mine(items: int) -> range:
    """Return the numbers of those of ``items`` batches that are this rank's; the first batch is the first rank's."""
    return range(_group.rank, items, _group.size)


def pieces(rows: int, most: int) -> list[slice]:
    """Return the pieces that ``rows`` are cut into, each of ``most`` rows or fewer.

    >>> pieces(100, 2048), len(pieces(4096, 2048)), len(pieces(32768, 2048))
    ([slice(0, 32, None), slice(32, 64, None), slice(64, 96, None), slice(96, 100, None)], 8, 16)
    """
    size = max(_STEP, min(most, -(-rows // (_PIECES * _STEP)) * _STEP))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def own(rows: int, most: int) -> list[slice]:
    """Return this rank's pieces of ``rows``, in order; ranks take turns, back and forth, so that early pieces may cost more."""
    turn = [*range(_group.size), *reversed(range(_group.size))]
    return [piece for i, piece in enumerate(pieces(rows, most)) if turn[i % len(turn)] == _group.rank]


def united(parts: Tensor) -> Tensor:
    """Return ``parts``, in which every rank has filled its own and left the rest 0, with the parts of all ranks."""
    if _group.size > 1 and parts.numel():
        width = {1: torch.uint8, 4: torch.int32, 8: torch.int64}[parts.element_size()]
        with _together():
            torch.distributed.all_reduce(parts.view(width))  # sums of integers with 0: every bit stays
    return parts


def leaders(learned: Tensor) -> Tensor:
    """Return the first rank's ``learned``: on GPUs the order of sums may differ, and with it what descent finds."""
    if alone():
        return learned
    flat = learned.contiguous().view(-1).view(torch.uint8)  # of at least one axis, and a type that all backends sum
    return united(flat.clone() if leads() else torch.zeros_like(flat)).view(learned.dtype).view(learned.shape)


def wait() -> None:
    """Return when every rank has come here."""
    united(torch.zeros(1, dtype=torch.int64))


def first(work: Callable[[], object]) -> bool:
    """Let the first rank do ``work`` while the others wait; return, on every rank, whether its result is true."""
    told = torch.zeros(1, dtype=torch.int64)
    if leads():
        told[0] = bool(work())
    return bool(united(told))


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Make this process one of those that torchrun started, while the block holds; nothing where there is but one.

    Args:
        device: where results are computed, "cpu" or "cuda".
    Raises:
        RankError: from whatever needs the others, once one of them has ended.
    """
    if started() == 1:
        yield
        return
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    cuda = device.startswith("cuda") and torch.cuda.is_available()
    try:
        store, rank, size = next(rendezvous("env://", timeout=_PATIENCE))
        _group.rank, _group.size, _group.local, _group.store = rank, size, int(os.environ.get("LOCAL_RANK", rank)), store
        if cuda:
            torch.cuda.set_device(_group.local)
        else:
            _pin()
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        distributed.init_process_group(backend, timeout=_PATIENCE, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RankError(f"the processes do not reach each other ({reason}); start them with torchrun --nproc-per-node N") from error
    before = signal.signal(signal.SIGTERM, _told_to_end)  # so torchrun ends the others when one has failed
    yield  # after a failure the rest of the process must still know that it is not alone, and whose turn it is to speak
    wait()
    signal.signal(signal.SIGTERM, before)
    distributed.destroy_process_group()
    _group.rank, _group.size, _group.local, _group.store = 0, 1, 0, None


def started() -> int:
    """Return how many processes torchrun started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _pin() -> None:
    """Give each rank its own share of the cores this machine lets it use, where there are enough."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if share := len(cores) // here:
        os.sched_setaffinity(0, cores[_group.local * share : (_group.local + 1) * share])


def speaks() -> bool:
    """Return whether this process is to tell of a failure: of all ranks the first that asks, once."""
    if _group.store is None:  # alone, or not yet joined: what fails then fails in all alike
        return os.environ.get("RANK", "0") == "0" or started() == 1
    try:
        return bool(_group.store.add("llm_fp4/failures told", 1) == 1)
    except RuntimeError:  # the launcher is gone too
        return leads()


def _told_to_end(number: int, frame: FrameType | None) -> None:
    raise _alone()


def _alone() -> RankError:
    return RankError(
        f"one of the {_group.size} processes ended, so this run stops; run the same command again, with any number of processes: "
        "finished blocks are kept"
    )


@contextmanager
def _together() -> Iterator[None]:
    """Turn a broken connection into one sentence."""
    try:
        yield
    except RuntimeError as error:
        raise _alone() from error
