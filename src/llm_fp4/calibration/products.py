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


def sequences_sampled(rows: int, batches: int) -> int:
    """Return how many sequences of each batch give about ``rows`` rows in all."""
    return max(1, -(-rows // (ROWS * batches)))


def kept_items(size: int, share: int) -> range:
    """Return which of the ``size`` sequences of a batch are looked at, about ``share`` of them."""
    return range(0, size, max(1, size // share))


def kept_rows(x: Tensor) -> Tensor:
    """Return the numbers of the rows of (batch, heads, rows, columns) ``x`` that are looked at, evenly spread."""
    return torch.arange(0, x.shape[2], max(1, -(-x.shape[2] // ROWS)), device=x.device)


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


def collect_product(
    attention: nn.Module, which: int, runs: Iterable[Callable[[], object]], rows: int,
    gradient: Callable[[int, int], Tensor | None] | None = None,
) -> Pairs:  # fmt: skip
    """Return pairs of inputs of one product of ``attention``, about ``rows`` rows in all, spread over the runs.

    Args:
        runs: for each batch a function that runs the block; it is cut short once the product was seen.
        gradient: of the loss at the product's kept rows, by batch and sequence; its square is what counts then.
    Returns:
        (heads, rows, inner), (heads, inner, columns) and what counts (see ProductSample), of single sequences.
    """
    runs = list(runs)
    share = sequences_sampled(rows, len(runs))
    pairs: Pairs = []
    batch = 0

    def watcher(module: nn.Module, index: int, first: Tensor, second: Tensor, mask: Tensor | None) -> None:
        if module is not attention or index != which:
            return
        kept = kept_rows(first)
        for item in kept_items(len(first), share):
            counts = None
            if mask is not None and mask.dim() == 4 and which == 0:
                visible = (mask[item % len(mask)] > MASKED) if mask.is_floating_point() else mask[item % len(mask)]
                counts = visible[:, kept % visible.shape[1], : second.shape[-1]].float()
            slope = None if gradient is None else gradient(batch, item)
            if slope is not None:
                counts = slope.to(first.device).float().square()  # 0 where the product is masked out
            pairs.append((first[item][:, kept].detach().float(), second[item].detach().float(), counts))
        raise _Enough

    with watching(watcher):
        for number, run in enumerate(runs):
            batch = number  # read by the watcher
            with suppress(_Enough):
                run()
    return pairs
