"""Gathering the inputs of linears while a module runs; which linears read the same tensor; hooks always detach."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llm_fp4 import ranks
from llm_fp4.statistics import TokenStore


class _Enough(Exception):
    """Every input that was wanted has been read."""


class _Unmultiplied(TorchFunctionMode):
    """Lets linear layers return zeros: which tensor goes where does not depend on the products, which are nearly all the work."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is nn.functional.linear and len(args) >= 2:
            x, weight = args[:2]
            return x.new_zeros(*x.shape[:-1], len(weight))
        return func(*args, **(kwargs or {}))


Linears = dict[str, nn.Module]


def _hook(stack: ExitStack, linears: Linears, hook: Callable[[str, Tensor], None]) -> None:
    for name, module in linears.items():

        def pre(_module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            hook(name, args[0])

        stack.callback(module.register_forward_pre_hook(pre).remove)


def shared_inputs(
    linears: Linears, run: Callable[[], object], rare: Collection[str] = (), later: Iterable[Callable[[], object]] = ()
) -> list[list[str]]:
    """Return the names of ``linears`` grouped by the tensor they read, in the order they run.

    Args:
        run: runs the module that holds them once, on any input: first without products, and again where some of them did not run so
            (or are ``rare``). Those that do not run then are left out.
        rare: those that not every input reaches. later: more runs, made until all of these ran.
    """
    groups: dict[int, list[str]] = {}
    earlier: set[str] = set()
    alive = []  # the tensors are kept, so that no id is given twice
    with ExitStack() as stack:

        def note(name: str, x: Tensor) -> None:
            if name in earlier:
                return
            alive.append(x)
            members = groups.setdefault(id(x), [])
            if name not in members:
                members.append(name)

        _hook(stack, linears, note)
        if not rare:
            with _Unmultiplied():
                run()
        if sum(map(len, groups.values())) < len(linears):  # values may decide what runs, as those of a router do
            groups.clear()
            run()
        for again in later:
            earlier = {n for members in groups.values() for n in members}
            if earlier >= set(rare):
                break
            again()
    return list(groups.values())


def inputs_of(linears: Linears, run: Callable[[], object]) -> list[Tensor]:
    """Return what ``linears`` read while ``run`` runs, in order."""
    seen: list[Tensor] = []
    with ExitStack() as stack:
        _hook(stack, linears, lambda _, x: seen.append(x))
        run()
    return seen


def token_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the (tokens, channels) rows of (..., channels) ``x`` without padding.

    Args:
        mask: (batch, tokens), 0 at padding, or None. An input of another leading shape is kept whole.
    """
    if mask is not None and x.shape[:-1] == mask.shape:
        return x[mask.bool()]
    if mask is not None and x.dim() == 2 and len(x) == mask.numel():  # tokens flattened before, as expert layers do
        return x[mask.flatten().bool()]
    return x.reshape(-1, x.shape[-1])


def collect(
    linears: Linears, runs: Iterable[tuple[Callable[[], object], Tensor | None]], folder: Path,
    transform: Callable[[Tensor], Tensor] | None = None, *, whole: bool = False,
) -> dict[str, TokenStore]:  # fmt: skip
    """Return the rows every one of ``linears`` reads over all ``runs``, stored in ``folder``; of several ranks each runs its own.

    A run is cut short once each of ``linears`` has read its input, unless what comes after is needed too.

    Args:
        linears: one for each site, by name.
        runs: for each batch a function that runs the module, and the batch's (batch, tokens) mask or None.
        transform: of rows before they are stored. whole: let every run come to its end.
    """
    runs, names = list(runs), list(linears)
    stores: dict[str, TokenStore] = {}
    seen = torch.zeros(len(names), len(runs), 2, dtype=torch.int64)  # channels and rows of every linear in every batch
    mask: Tensor | None = None
    waiting: set[str] = set()
    with ExitStack() as stack:

        def keep(name: str, x: Tensor) -> None:
            i = names.index(name)
            if name not in stores:
                stores[name] = TokenStore(folder / f"{i}.rows", x.shape[-1])
            rows = token_rows(x.detach(), mask)
            stores[name].append(rows if transform is None else transform(rows))
            seen[i, batch, 0] = x.shape[-1]
            seen[i, batch, 1] += len(rows)
            waiting.discard(name)
            if not waiting and not whole:
                raise _Enough

        _hook(stack, linears, keep)
        for batch in ranks.mine(len(runs)):
            run, mask = runs[batch]
            waiting = set(linears)  # read by the hook, like the batch and its mask
            with suppress(_Enough):
                run()
    for i, (name, table) in enumerate(zip(names, ranks.united(seen), strict=True)):
        if channels := int(table[:, 0].max()):  # it ran, here or on another rank
            if name not in stores:
                stores[name] = TokenStore(folder / f"{i}.rows", channels)
            stores[name].settle(table[:, 1].tolist())
    return stores
