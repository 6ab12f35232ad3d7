"""The calibration data of one block cut into steps of descent, with the float block's outputs to be reached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from llm_fp4.models import BlockRunner

_STEP_TOKENS, _STEPS = 512, 16  # of one step of descent at most; in one pass at least, where there are so many sequences


@dataclass
class Step:
    """A few sequences of one batch: the block's arguments, the float output wanted, the weight of each token."""

    call: tuple[tuple[Any, ...], dict[str, Any]]
    target: Tensor
    weight: Tensor


class BlockSteps:
    """The calibration data cut into steps of a few hundred tokens; iterating goes through all, in order."""

    def __init__(self, runner: BlockRunner, name: str, mask: Callable[[int], Tensor | None]) -> None:
        self.block = runner.model.get_submodule(name)
        self._all: list[Step] = []
        energy = []
        calls = [runner.arguments(name, i) for i in range(len(runner.batches))]
        tokens = sum(_first(call).shape[:-1].numel() for call in calls)
        for i, call in enumerate(calls):
            target = _first(self.block(*call[0], **call[1]))
            hidden = _first(call)
            added = (target - hidden if hidden.shape == target.shape else target).square().mean(-1)
            kept = mask(i)
            if kept is not None and kept.shape == added.shape:
                added = torch.where(kept.bool(), added, torch.inf)  # padding weighs nothing
            energy.append(added)
            size = max(1, min(_STEP_TOKENS, tokens // _STEPS) // max(target.shape[1:-1].numel(), 1))
            self._all += [
                Step(_part(call, slice(j, j + size), len(target)), target[j : j + size], added[j : j + size])
                for j in range(0, len(target), size)
            ]
        finite = torch.cat([e.flatten() for e in energy])
        finite = finite[finite.isfinite()]
        # tokens that a block changes a thousand times more than others (attention sinks) would be all that counts
        total, median = finite.mean().clamp_min(1e-30), finite.median().clamp_min(1e-30)
        for step in self._all:
            step.weight = (median / step.weight.clamp_min(median) / total).unsqueeze(-1)

    def __iter__(self) -> Iterator[Step]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def shuffled(self, generator: torch.Generator) -> Iterator[Step]:
        return (self._all[i] for i in torch.randperm(len(self._all), generator=generator).tolist())

    def loss(self, step: Step) -> Tensor:
        """Return the weighted squared error of the block as it stands, relative to what it adds."""
        out = _first(self.block(*step.call[0], **step.call[1]))
        return ((out - step.target).square() * step.weight).mean()


def _first(tree: Any) -> Tensor:
    found: Tensor = next(x for x in tree_leaves(tree) if isinstance(x, Tensor))
    return found


def _part(call: Any, where: slice, size: int) -> Any:
    """Return the arguments of some sequences of a batch of ``size``."""
    return tree_map_only(Tensor, lambda x: x[where] if x.dim() > 1 and len(x) == size else x, call)
