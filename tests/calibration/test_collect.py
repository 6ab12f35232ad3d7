"""Which linears share an input, what is kept of it, and that nothing stays attached."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llm_fp4.calibration import collect, shared_inputs, token_rows


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o, self.idle = (nn.Linear(4, 4) for _ in range(4))
        self.finished = 0

    def forward(self, x: Tensor) -> Tensor:
        normed = x * 2
        out: Tensor = self.o(self.q(normed) + self.k(normed))
        self.finished += 1
        return out


def test_linears_are_grouped_by_the_tensor_they_read() -> None:
    block = Block()
    linears = {n: block.get_submodule(n) for n in ("o", "k", "q", "idle")}
    assert shared_inputs(linears, lambda: block(torch.randn(2, 3, 4))) == [["q", "k"], ["o"]]
    assert not any(m._forward_pre_hooks for m in block.modules())


class Gated(nn.Module):
    """Runs its second linear where the first one's output says so."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.more = nn.Linear(4, 4), nn.Linear(4, 4)
        nn.init.ones_(self.gate.bias)
        self.gates: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.gates.append(self.gate(x))
        return self.more(x) if self.gates[-1].abs().max() > 0 else x


def test_products_are_left_out_where_they_do_not_decide_what_runs() -> None:
    block = Gated()
    assert shared_inputs({"gate": block.gate, "more": block.more}, lambda: block(torch.ones(1, 4))) == [["gate", "more"]]
    assert [bool(g.abs().max() > 0) for g in block.gates] == [False, True]
    block.gates.clear()
    assert shared_inputs({"gate": block.gate}, lambda: block(torch.ones(1, 4))) == [["gate"]]
    assert len(block.gates) == 1


def test_rows_are_collected_without_padding_and_the_rest_of_the_block_is_not_run(tmp_path: Path) -> None:
    block, x = Block(), torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    stores = collect({"q": block.q}, [(lambda: block(x), mask), (lambda: block(x + 1), None)], tmp_path)
    assert torch.equal(stores["q"].rows, torch.cat(((x * 2)[mask.bool()], ((x + 1) * 2).reshape(-1, 4))))
    assert block.finished == 0
    assert not block.q._forward_pre_hooks


def test_hooks_detach_when_a_run_fails(tmp_path: Path) -> None:
    block = Block()

    def failing() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect({"q": block.q}, [(failing, None)], tmp_path)
    assert not block.q._forward_pre_hooks


def test_token_rows_of_other_shapes_are_kept_whole() -> None:
    x = torch.randn(5, 4)
    assert torch.equal(token_rows(x, torch.ones(2, 3)), x)
