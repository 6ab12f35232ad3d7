"""Gathering the inputs of attention products while a block runs, and finding which attention modules it has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress

import torch
from torch import Tensor, nn

from llm_fp4.calibration.collect import Linears, _Enough, _hook
from llm_fp4.nn import watching

ROWS = 64  # of one sequence: enough of its queries, while all of its keys are needed
MASKED = -1e4  # an additive mask below this hides the product

Pairs = list[tuple[Tensor, Tensor, Tensor | None]]


def attention_order(block: nn.Module, linears: Linears, run: Callable[[], object]) -> list[tuple[str, set[str]]]:
    """Return the attention modules of ``block`` that run two products, each with the names of ``linears`` that ran before it."""
    names = {id(m): n for n, m in block.named_modules()}
    before: set[str] = set()
    found: dict[str, set[str]] = {}
    complete: set[str] = set()

    def watcher(module: nn.Module, which: int, first: Tensor, second: Tensor, mask: Tensor | None) -> None:
        name = names.get(id(module))
        if name is not None and first.dim() == 4 and second.dim() == 4:
            found.setdefault(name, set(before))
            complete.update({name} if which == 1 else ())

    with ExitStack() as stack:
        _hook(stack, linears, lambda name, _: before.add(name))
        stack.enter_context(watching(watcher))
        run()
    return [(n, linears_before) for n, linears_before in found.items() if n in complete]


def collect_product(attention: nn.Module, which: int, runs: Iterable[Callable[[], object]], rows: int) -> Pairs:
    """Return pairs of inputs of one product of ``attention``, about ``rows`` rows in all, spread over the runs.

    Args:
        runs: for each batch a function that runs the block; it is cut short once the product was seen.
    Returns:
        (heads, rows, inner), (heads, inner, columns) and what counts (see ProductSample), of single sequences.
    """
    runs = list(runs)
    share = max(1, -(-rows // (ROWS * len(runs))))  # sequences of a batch
    pairs: Pairs = []

    def watcher(module: nn.Module, index: int, first: Tensor, second: Tensor, mask: Tensor | None) -> None:
        if module is not attention or index != which:
            return
        for item in range(0, len(first), max(1, len(first) // share)):
            queries = first.shape[2]
            kept = torch.arange(0, queries, max(1, -(-queries // ROWS)), device=first.device)
            counts = None
            if mask is not None and mask.dim() == 4 and which == 0:
                visible = (mask[item % len(mask)] > MASKED) if mask.is_floating_point() else mask[item % len(mask)]
                counts = visible[:, kept % visible.shape[1], : second.shape[-1]].float()
            pairs.append((first[item][:, kept].detach().float(), second[item].detach().float(), counts))
        raise _Enough

    with watching(watcher):
        for run in runs:
            with suppress(_Enough):
                run()
    return pairs
