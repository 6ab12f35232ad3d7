"""What the linears of a pre-norm block do with the residual stream, found by running it, not by their names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn


@dataclass
class BlockRoles:
    """The linears of one block, by name within it.

    Attributes:
        readers: linear → the norm whose output it reads. writers: linears that add to the residual stream.
        values: the value projection → the writer that reads its mix over tokens.
    """

    readers: dict[str, str] = field(default_factory=dict)
    writers: list[str] = field(default_factory=list)
    values: dict[str, str] = field(default_factory=dict)

    @property
    def hidden(self) -> list[str]:
        """Writers whose input no merged rotation reaches: those behind an activation function."""
        return [w for w in self.writers if w not in self.values.values()]


def is_norm(module: nn.Module, width: int) -> bool:
    """Return whether ``module`` has one gain a channel and nothing else: RMSNorm in any writing, not LayerNorm."""
    own = {n: p for n, p in module._parameters.items() if p is not None}
    return list(own) == ["weight"] and tuple(own["weight"].shape) == (width,)


@contextmanager
def _watching(modules: dict[str, nn.Module]) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Give what every module reads and returns while the block holds."""
    read: dict[str, Tensor] = {}
    returned: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, module in modules.items():

            def note(_m: nn.Module, args: tuple[Any, ...], out: Tensor, name: str = name) -> None:
                read[name], returned[name] = args[0], out

            stack.callback(module.register_forward_hook(note).remove)
        yield read, returned


def norm_before(module: nn.Module, run: Callable[[], object], width: int) -> dict[str, str]:
    """Return linear → norm for every linear below ``module`` that reads a norm's output itself."""
    norms = {n: m for n, m in module.named_modules() if is_norm(m, width)}
    linears = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    with _watching({**norms, **linears}) as (read, returned):
        run()
    # equal, not identical: heads read a slice of all tokens
    return {n: norm for n in linears for norm in norms if n in read and norm in returned and torch.equal(read[n], returned[norm])}


def block_roles(block: nn.Module, run: Callable[[], object], width: int) -> BlockRoles:
    """Return the roles of a block's linears.

    Args:
        block: with real weights. run: runs it once, the same way each time, on at least two tokens of a sequence.
        width: of the residual stream.
    """
    linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    readers = norm_before(block, run, width)
    writers = [n for n, m in linears.items() if n not in readers and m.out_features == width]
    with _watching({n: linears[n] for n in writers}) as (read, _):
        run()
        plain = {n: x.clone() for n, x in read.items()}
    roles = BlockRoles(readers, [n for n in linears if n in plain])
    for name in readers:
        doubled = _changed(block, linears[name], lambda y: 2 * y, roles.writers, run)
        first = _changed(block, linears[name], _without_first_token, roles.writers, run)
        for writer in roles.writers:
            linear = torch.allclose(doubled[writer], 2 * plain[writer], rtol=1e-3, atol=1e-5 * float(plain[writer].abs().max()))
            mixes = not torch.equal(first[writer][..., 1:, :], plain[writer][..., 1:, :])
            if linear and mixes and plain[writer].abs().max() > 0:
                roles.values[name] = writer
                break
    return roles


def _without_first_token(y: Tensor) -> Tensor:
    out = y.clone()
    out[..., 0, :] = 0
    return out


def _changed(
    block: nn.Module, linear: nn.Module, change: Callable[[Tensor], Tensor], writers: list[str], run: Callable[[], object]
) -> dict[str, Tensor]:
    """Return what the writers read when the output of ``linear`` is changed."""
    handle = linear.register_forward_hook(lambda _m, _args, out: change(cast(Tensor, out)))
    try:
        with _watching({n: block.get_submodule(n) for n in writers}) as (read, _):
            run()
    finally:
        handle.remove()
    return read
