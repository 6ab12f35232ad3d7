"""Running one block of a model on stored outputs, without running the blocks before it again.

Every block is replaced by a stub. The model's own forward then costs next to nothing: the stub of the last finished
block of each stack returns that block's stored output, the model does whatever it does between blocks and stacks, and
the stub of the block at work gets the arguments (hidden states, masks, positions, the encoder's states) of its block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from llm_fp4.errors import UnsupportedError
from llm_fp4.models.structure import placed

Batch = dict[str, Any]
Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Stop(Exception):
    pass


class _Stub(nn.Module):
    """Stands for a block: asks the runner what to return; everything else it is asked for is the block's own."""

    def __init__(self, block: nn.Module, runner: BlockRunner, stack: str, index: int) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)  # not a submodule: its parameters may be on the meta device
        object.__setattr__(self, "_runner", runner)
        self.stack, self.index = stack, index

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        runner: BlockRunner = self._runner
        return runner.called(self.stack, self.index, (args, kwargs))


class BlockRunner:
    """Calls the blocks of ``model`` one by one, in the order it finds them to run.

    Args:
        model: with real parameters outside its blocks.
        stacks: names of the blocks of each stack.
        batches: keyword arguments of the model.
        output: returns what a finished block, by name, returned for a batch, by number.
    Attributes:
        done: how many blocks of each stack are finished.
    """

    def __init__(
        self, model: nn.Module, stacks: dict[str, list[str]], batches: list[Batch], output: Callable[[str, int], Any]
    ) -> None:
        self.model, self.stacks, self.batches, self.output = model, stacks, batches, output
        self.done = dict.fromkeys(stacks, 0)
        self._batch = 0
        self._blank = False
        self._seen: dict[str, int] = {}
        self._filler: dict[str, Any] = {}
        self._reached: tuple[str, int] | None = None
        self._call: Call | None = None

    @contextmanager
    def _stubs(self) -> Iterator[None]:
        stubs = {
            name: _Stub(self.model.get_submodule(name), self, stack, i)
            for stack, names in self.stacks.items()
            for i, name in enumerate(names)
        }
        with placed(self.model, stubs):
            yield

    def called(self, stack: str, index: int, call: Call) -> Any:
        """Return what the block at ``index`` of ``stack`` is to return now, or stop the forward pass if that is not known.

        Raises:
            UnsupportedError: blocks run twice or out of order.
        """
        name, seen = self.stacks[stack][index], self._seen.get(stack, 0)
        if index < seen:
            raise UnsupportedError(
                f"{name} runs more than once in a forward pass, which is not implemented; such a model cannot be quantized block by block"
            )
        if index > seen:
            raise UnsupportedError(
                f"{name} runs before {self.stacks[stack][seen]}; blocks out of order are not implemented, so this model cannot be quantized"
            )
        self._seen[stack] = index + 1
        done = self.done[stack]
        if index >= done:
            self._reached, self._call = (stack, index), call
            raise _Stop
        if index == done - 1:
            return self._stored(stack)
        # only the last finished block's output is meant; what the model does with the others must not matter
        if stack not in self._filler:
            out = self._stored(stack)
            self._filler[stack] = tree_map_only(Tensor, torch.zeros_like, out) if self._blank else out
        return self._filler[stack]

    def _stored(self, stack: str) -> Any:
        batch = self.batches[self._batch]
        device = next((x.device for x in tree_leaves(batch) if isinstance(x, Tensor)), torch.device("cpu"))
        out = self.output(self.stacks[stack][self.done[stack] - 1], self._batch)
        return tree_map_only(Tensor, lambda x: x.to(device), out)

    @torch.no_grad()
    def _forward(self, batch: int, *, blank: bool = False) -> Any:
        """Run the model on a batch until a block that is not finished; return its output if there is none."""
        self._batch, self._blank, self._seen, self._filler = batch, blank, {}, {}
        self._reached, self._call = None, None
        with self._stubs(), suppress(_Stop):
            return self.model(**self.batches[batch])
        return None

    def next_block(self) -> str | None:
        """Return the name of the block that runs next, or None when the model needs no more of them.

        Raises:
            UnsupportedError: a stack that is not finished must wait for another (interleaved stacks).
        """
        begun = [s for s, n in self.done.items() if 0 < n < len(self.stacks[s])]
        self._forward(0)
        if self._reached is None:
            return None
        stack, index = self._reached
        if begun and stack != begun[0]:
            raise UnsupportedError(
                f"{self.stacks[stack][index]} runs between the blocks of {begun[0]}; stacks that take turns are not implemented"
            )
        return self.stacks[stack][index]

    def idle(self) -> list[str]:
        """Return the names of blocks that are not finished."""
        return [name for stack, names in self.stacks.items() for name in names[self.done[stack] :]]

    def arguments(self, name: str, batch: int) -> Call:
        """Return the arguments the block ``name`` gets for a batch.

        Raises:
            UnsupportedError: it depends on other blocks than the one before it, or is not reached.
        """
        self._forward(batch)
        call, reached = self._call, self._reached
        if call is None or reached is None or self.stacks[reached[0]][reached[1]] != name:
            where = self.stacks[reached[0]][reached[1]] if reached else "the end"
            raise UnsupportedError(f"{name} does not run where it ran before ({where} came first); calibrate on inputs of one kind")
        return call

    def check(self, name: str | None, watch: Callable[[Callable[[], Any]], Any] | None = None) -> None:
        """Raise UnsupportedError if a block (None: what runs after all blocks) reads more than the last output of each stack.

        Args:
            watch: after all blocks: runs what it is given and returns the tensors that count.
        """
        if all(n < 2 for n in self.done.values()):
            return

        def seen(blank: bool) -> list[Any]:
            if watch is not None:
                return tree_leaves(watch(lambda: self._forward(0, blank=blank)))
            self._forward(0, blank=blank)
            return tree_leaves(self._call)

        for a, b in zip(seen(False), seen(True), strict=True):
            if isinstance(a, Tensor) and not (a.shape == b.shape and torch.equal(a, b)):
                raise UnsupportedError(
                    f"{name or 'a layer after the blocks'} reads outputs of several blocks before it, which is not implemented; "
                    f"{type(self.model).__name__} cannot be quantized block by block"
                )

    @torch.no_grad()
    def run(self, name: str, batch: int) -> Any:
        """Return the output of the block ``name``, whose parameters must be real, for a batch."""
        args, kwargs = self.arguments(name, batch)
        return self.model.get_submodule(name)(*args, **kwargs)

    def finish(self, name: str) -> None:
        """Count the block ``name`` as finished: its outputs are known from now on."""
        stack = next(s for s, names in self.stacks.items() if name in names)
        assert self.stacks[stack][self.done[stack]] == name
        self.done[stack] += 1

    def last_blocks(self) -> list[str]:
        """Return the names of the blocks whose outputs are still read: the last finished one of each stack."""
        return [self.stacks[s][n - 1] for s, n in self.done.items() if n]

    def tail(self, batch: int) -> Any:
        """Run the model on a batch until a block that is not finished; return its output if there is none."""
        return self._forward(batch)
