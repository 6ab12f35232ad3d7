"""Running one block of a model on stored inputs, without running the blocks before it again.

Every block is replaced by a stub. The model's own forward then costs next to nothing and hands each stub the
arguments (masks, positions, the encoder's states) its block would get; only the hidden states come from storage.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from llm_fp4.errors import SourceError, UnsupportedError
from llm_fp4.models.structure import set_module

Batch = dict[str, Any]


class _Stop(Exception):
    pass


def _hidden_name(kwargs: dict[str, Any]) -> str:
    """Return the keyword under which a block called without positional arguments gets its hidden states."""
    if "hidden_states" in kwargs:
        return "hidden_states"
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            return name
    raise UnsupportedError("a block is called without any float tensor, so its input cannot be found")


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs[_hidden_name(kwargs)]
    return hidden


class _Stub(nn.Module):
    """Stands for a block: records its arguments, then passes the hidden states on, or stops the forward."""

    def __init__(self, block: nn.Module, runner: BlockRunner, index: int) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)  # not a submodule: its parameters may be on the meta device
        object.__setattr__(self, "_runner", runner)
        self.index = index

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        runner: BlockRunner = self._runner
        hidden = _hidden(args, kwargs)
        if self.index in runner.visited:
            raise UnsupportedError(f"{runner.blocks[self.index]} runs more than once in a forward pass, which is not implemented")
        runner.visited.add(self.index)
        if runner.passed is not None and hidden is not runner.passed and not torch.equal(hidden, runner.passed):
            raise UnsupportedError(
                f"the model changes the hidden states between blocks, before {runner.blocks[self.index]}, which is not implemented; "
                "make it part of a block"
            )
        if self.index == runner.stop:
            runner.call = (args, kwargs)
            raise _Stop
        if self.index == runner.last and runner.hidden is not None:
            hidden = runner.hidden
        runner.passed = hidden if self.index < runner.last else None
        return (hidden,) if runner.tuples else hidden


class BlockRunner:
    """Calls the blocks of ``model`` one by one.

    Args:
        model: with real parameters outside its blocks.
        blocks: names of the blocks in the order they run, all of one stack.
    """

    def __init__(self, model: nn.Module, blocks: list[str]) -> None:
        self.model, self.blocks = model, blocks
        self.stop: int | None = None
        self.last = len(blocks) - 1
        self.hidden: Tensor | None = None
        self.call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.tuples = False
        self.passed: Tensor | None = None  # what the stub before handed on
        self.visited: set[int] = set()

    @contextmanager
    def _stubs(self) -> Iterator[None]:
        self.passed, self.visited = None, set()
        real = {name: self.model.get_submodule(name) for name in self.blocks}
        try:
            for i, name in enumerate(self.blocks):
                set_module(self.model, name, _Stub(real[name], self, i))
            yield
        finally:
            for name, block in real.items():
                set_module(self.model, name, block)

    @torch.no_grad()
    def arguments(self, index: int, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments block ``index`` gets for ``batch``; for blocks after the first the hidden states are not real."""
        self.stop, self.call = index, None
        with self._stubs(), suppress(_Stop):
            self.model(**batch)
        call: tuple[tuple[Any, ...], dict[str, Any]] | None = self.call
        if call is None:
            raise SourceError(
                f"the forward pass of {type(self.model).__name__} never reached {self.blocks[index]}; its blocks do not run in order"
            )
        return call

    def first_hidden(self, batch: Batch) -> Tensor:
        """Return the (batch, tokens, channels) input of the first block."""
        args, kwargs = self.arguments(0, batch)
        return _hidden(args, kwargs)

    @torch.no_grad()
    def run(self, index: int, block: nn.Module, batch: Batch, hidden: Tensor) -> Tensor:
        """Return the output of ``block`` standing at ``index`` for stored ``hidden`` states."""
        args, kwargs = self.arguments(index, batch)
        if args:
            args = (hidden, *args[1:])
        else:
            kwargs = {**kwargs, _hidden_name(kwargs): hidden}
        out = block(*args, **kwargs)
        self.tuples = isinstance(out, tuple)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    @torch.no_grad()
    def tail(self, batch: Batch, hidden: Tensor) -> Any:
        """Return the model's output with ``hidden`` as the output of the last block."""
        self.stop, self.hidden = None, hidden
        try:
            with self._stubs():
                return self.model(**batch)
        finally:
            self.hidden = None
