"""Rotating a model as its weights are read: the roles of its linears, the check that its function stays, the source."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from llm_fp4.errors import UnsupportedError
from llm_fp4.models import Batch, BlockRunner, InMemory, Structure, WeightSource
from llm_fp4.transforms import BlockRoles, Merge, Rotation, block_roles, norm_before

_TOKENS = 16  # of one sequence, on which the rotated model must do what the float model does
_TOLERANCE = 2e-3  # of the largest value; float32 rounding stays below 1e-4


class RotatedSource:
    """A weight source whose tensors come rotated, see :class:`~llm_fp4.transforms.Merge`.

    Args:
        hidden: full names of the linears whose input no merged rotation reaches.
    """

    def __init__(self, source: WeightSource, merge: Merge, hidden: list[str]) -> None:
        self._source, self._merge, self.hidden = source, merge, hidden
        self._done: set[str] | None = set() if isinstance(source, InMemory) else None

    def load(self, model: nn.Module, name: str, device: torch.device, wanted: Any = None) -> nn.Module:
        before = {full for full, m in _owners(model, name) if self._merge.changes(full) and self._waits(full, m)}
        module = self._source.load(model, name, device) if wanted is None else self._source.load(model, name, device, wanted)
        read = {n: m for n, m in _owners(model, name) if n in before and not m.weight.is_meta}
        self._merge.apply(read)
        if self._done is not None:
            self._done |= set(read)
        return module

    def _waits(self, full: str, module: nn.Module) -> bool:
        """Return whether the module holds no tensors yet, or those of the float model in memory."""
        return full not in self._done if self._done is not None else cast(Tensor, module.weight).is_meta

    def release(self, model: nn.Module, name: str) -> None:
        self._source.release(model, name)

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(name)

    def table(self, name: str) -> Tensor | None:
        return None  # the stored one is not rotated

    def part(self, name: str, stored: str, index: int | None, transposed: bool) -> None:
        self._source.part(name, stored, index, transposed)


class _Probe:
    """Runs the parts of a model on one short batch: what comes before its blocks, the first block, what comes after them."""

    def __init__(self, model: nn.Module, structure: Structure, batch: Batch) -> None:
        self.runner = BlockRunner(model, structure.stacks, [batch], lambda name, i: self._output)
        self._output: Any = None
        (self._stack,) = structure.stacks
        self.first = structure.blocks[0]

    def first_hidden(self) -> Tensor:
        self.runner.done[self._stack] = 0
        args, kwargs = self.runner.arguments(self.first, 0)
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        return hidden

    def run(self, hidden: Tensor) -> Tensor:
        self.runner.done[self._stack] = 0
        args, kwargs = self.runner.arguments(self.first, 0)
        args, kwargs = ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})
        out = self._output = self.runner.model.get_submodule(self.first)(*args, **kwargs)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def tail(self, hidden: Tensor) -> Any:
        """Return the model's output with ``hidden`` as that of its last block."""
        self._output = (hidden, *self._output[1:]) if isinstance(self._output, tuple) else hidden
        self.runner.done[self._stack] = len(self.runner.stacks[self._stack])
        return self.runner.tail(0)


def rotated(
    model: nn.Module, structure: Structure, source: WeightSource, batch: Batch, device: torch.device, seed: int
) -> RotatedSource:
    """Return the source of the rotated model.

    Args:
        model: as it was opened. batch: any; a few tokens of its first sequence are run.
    Raises:
        UnsupportedError: the model is not of the kind in which rotations merge; the message says what differs.
    """
    short = {k: v[:1, :_TOKENS] if isinstance(v, Tensor) and v.dim() == 2 else v for k, v in batch.items()}
    if len(structure.stacks) > 1:
        raise _refusal(model, f"it has {len(structure.stacks)} stacks of blocks")
    first, runner = structure.blocks[0], _Probe(model, structure, short)
    source.load(model, "", device, lambda n: not n.startswith(tuple(f"{b}." for b in structure.blocks)))
    block = source.load(model, first, device)
    hidden = runner.first_hidden()
    width = hidden.shape[-1]
    roles = block_roles(block, lambda: runner.run(hidden), width)
    _check_roles(model, structure, roles)
    after = runner.run(hidden)
    outer = norm_before(model, lambda: runner.tail(after), width)
    outer = {n: norm for n, norm in outer.items() if n in structure.outer_linears}
    head_dim = _head_dim(model)
    merge = Merge(
        Rotation(width, seed), Rotation(head_dim, seed + 1) if head_dim else None, structure.embeddings,
        dict.fromkeys(structure.blocks, roles), outer,
    )  # fmt: skip
    expected = _output(runner.tail(after))
    changed = {n: m for n, m in [*_owners(model, ""), *_owners(model, first)] if merge.changes(n) and not m.weight.is_meta}
    with _restored(changed):
        merge.apply(changed)
        again = runner.first_hidden()
        _same(model, again, merge.residual.right(hidden), "its embeddings do more than look rows up")
        now = runner.run(again)
        _same(
            model,
            now,
            merge.residual.right(after),
            f"{first} is no pre-norm block with RMSNorm, or its heads are laid out otherwise",
        )
        _same(model, _output(runner.tail(now)), expected, "what follows its blocks is not RMSNorm and linears")
    if not isinstance(source, InMemory):
        source.release(model, "")
    return RotatedSource(source, merge, [f"{b}.{n}" for b in structure.blocks for n in roles.hidden])


def _check_roles(model: nn.Module, structure: Structure, roles: BlockRoles) -> None:
    if not roles.readers or not roles.writers:
        raise _refusal(model, f"no linear of {structure.blocks[0]} reads the output of an RMSNorm")
    inside = [{n.removeprefix(f"{b}.") for n in structure.linears[b]} for b in structure.blocks]
    if any(names != inside[0] for names in inside):
        raise _refusal(model, "its blocks are not alike")
    if left := sorted(inside[0] - set(roles.readers) - set(roles.writers)):
        raise _refusal(model, f"{left[0]} neither reads a norm nor writes the residual stream")
    if structure.others:
        raise _refusal(model, f"{structure.others[0]} is no linear")


def _refusal(model: nn.Module, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"rotation merges into models like LLaMA, and {type(model).__name__} differs: {why}; leave transforms.rotation out of the recipe"
    )


def _same(model: nn.Module, found: Tensor, expected: Tensor, why: str) -> None:
    if found.shape != expected.shape or float((found - expected).abs().max()) > _TOLERANCE * float(expected.abs().max()):
        raise _refusal(model, why)


def _head_dim(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    if config is None:
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found: int | None = getattr(text, "head_dim", None)
    if not found and getattr(text, "num_attention_heads", None):
        found = text.hidden_size // text.num_attention_heads
    return found


def _output(out: Any) -> Tensor:
    """Return the first tensor of a model's output: its logits."""
    while not isinstance(out, Tensor):
        out = next(iter(out.values())) if hasattr(out, "values") else out[0]
    return out


def _owners(model: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """Return (full name, module) of every module below ``name`` that has a weight of its own."""
    found = model.get_submodule(name).named_modules(remove_duplicate=False)
    return [
        (".".join(p for p in (name, path) if p), m) for path, m in found if getattr(m, "_parameters", {}).get("weight") is not None
    ]


@contextmanager
def _restored(modules: dict[str, nn.Module]) -> Iterator[None]:
    before = {n: dict(m._parameters) for n, m in modules.items()}
    try:
        yield
    finally:
        for n, m in modules.items():
            m._parameters.update(before[n])
