"""Which attention modules of a block keep keys and values while a decoder writes, and what they multiply them with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

import torch
from torch import Tensor, nn

from llm_fp4.calibration.collect import _Enough
from llm_fp4.calibration.products import MASKED, ROWS, Pairs, kept_items, sequences_sampled
from llm_fp4.nn import watching


def causal_attentions(block: nn.Module, run: Callable[[], object]) -> tuple[list[str], list[str]]:
    """Return the names of the attention modules of ``block`` that see no later token, and of those that see all of them.

    The first keep their keys and values while a decoder writes; the others belong to encoders or read an encoder's states.
    """
    names = {id(m): n for n, m in block.named_modules()}
    causal: dict[str, bool] = {}

    def watcher(module: nn.Module, which: int, first: Tensor, second: Tensor, mask: Tensor | None) -> None:
        name = names.get(id(module))
        if name is not None and which == 0 and first.dim() == 4 and second.dim() == 4:
            causal[name] = _is_causal(mask, first.shape[2], second.shape[3])

    with watching(watcher):
        run()
    return [n for n, yes in causal.items() if yes], [n for n, yes in causal.items() if not yes]


def _is_causal(mask: Tensor | None, queries: int, keys: int) -> bool:
    if mask is None or mask.dim() != 4 or queries != keys or queries < 2 or mask.shape[2:] != (queries, keys):
        return False
    later = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).triu_(1)
    return not bool(_seen(mask)[..., later].any())


def _seen(mask: Tensor) -> Tensor:
    return mask > MASKED if mask.is_floating_point() else mask.bool()


def collect_cached(
    attention: nn.Module, runs: Iterable[Callable[[], object]], rows: int, sinks: int, window: int
) -> tuple[Pairs, Pairs]:
    """Return the inputs of both products of a causal ``attention``, about ``rows`` query rows in all, spread over the runs.

    Only what a query reads in codes counts: not the first ``sinks`` tokens and not the ``window`` tokens before it, as long
    as the sequences are longer than that.

    Args:
        runs: for each batch a function that runs the block; it is cut short once the second product was seen.
    Returns:
        query, key' and what counts; probability (0 where it does not count), value and None; all of single sequences.
    """
    runs = list(runs)
    share = sequences_sampled(rows, len(runs))
    scores: Pairs = []
    outputs: Pairs = []
    counted: list[tuple[int, Tensor, Tensor]] = []  # of the batch at work: item, its rows, what counts

    def watcher(module: nn.Module, which: int, first: Tensor, second: Tensor, mask: Tensor | None) -> None:
        if module is not attention:
            return
        if which == 0:
            counted.clear()
            for item in kept_items(len(first), share):
                count = first.shape[2]
                kept = torch.arange(count - 1, -1, -max(1, -(-count // ROWS)), device=first.device).flip(0)
                counts = _counting(kept, count, mask, item, sinks, window)
                counted.append((item, kept, counts))
                scores.append((first[item][:, kept].detach().float(), second[item].detach().float(), counts))
            return
        for item, kept, counts in counted:
            outputs.append((first[item][:, kept].detach().float() * counts, second[item].detach().float(), None))
        raise _Enough

    with watching(watcher):
        for run in runs:
            with suppress(_Enough):
                run()
    return scores, outputs


def _counting(kept: Tensor, tokens: int, mask: Tensor | None, item: int, sinks: int, window: int) -> Tensor:
    """Return (1 or heads, rows, tokens) float: 1 where the query of a row reads a key in codes."""
    position = torch.arange(tokens, device=kept.device)
    distance = kept[:, None] - position
    seen = (distance >= 0)[None]
    if mask is not None and mask.dim() == 4:
        seen = seen & _seen(mask[item % len(mask)])[:, kept % mask.shape[2], :tokens]
    first = seen.any(1).any(0).float().argmax()  # after padding on the left
    for far in ((distance >= window) & (position >= first + sinks), position >= first + sinks):
        if bool((found := seen & far).any()):
            return found.float()
    return seen.float()
