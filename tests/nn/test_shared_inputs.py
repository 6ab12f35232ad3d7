"""Linears of one site: rounded once, equal to rounding for each, and never wrongly taken over."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llm_fp4.nn import QuantLinear, linear, share_inputs
from llm_fp4.numerics import PerRow, parse, quantize_tensor, scale_of_max
from llm_fp4.plan import InputPlan, InputSpec


class Attention(nn.Module):
    def __init__(self, transform: str | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        shift = torch.randint(0, 4, (16,), dtype=torch.uint8)
        for name, fmt, scale in (("q", "e2m1", 0.2), ("k", "e3m0", 0.2), ("v", "e1m2", 0.2), ("o", "e2m1", 0.3)):
            plan = InputPlan(name, [name], InputSpec(parse("e2m1"), max_shift=3, transform=transform), torch.tensor(scale), shift)
            weight = torch.randn(8, 16)
            packed = quantize_tensor(weight, scale_of_max(weight.abs().amax(1), parse(fmt)), parse(fmt), PerRow())
            setattr(self, name, QuantLinear.from_plan(packed, plan, None))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.q(x), self.k(x), self.v(x), self.o(x)]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls = [0]
    real = linear.quantize_input

    def count(*arguments: object) -> tuple[Tensor, Tensor]:
        calls[0] += 1
        return real(*arguments)

    monkeypatch.setattr(linear, "quantize_input", count)
    return calls


def test_an_input_is_rounded_once_and_every_output_is_the_same(counted: list[int]) -> None:
    model, x = Attention(), torch.randn(20, 16)
    names = list(model.state_dict())
    with torch.no_grad():
        alone = model(x)
        assert counted == [0]  # each as one operation with its product
        share_inputs(model)
        assert model.q.site is model.k.site is model.v.site
        assert model.o.site is None  # another scale
        shared = model(x)
    assert counted == [1]
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
    assert list(model.state_dict()) == names


def test_another_or_a_changed_tensor_is_rounded_anew(counted: list[int]) -> None:
    model, x = Attention(), torch.randn(20, 16)
    share_inputs(model)
    with torch.no_grad():
        model.q(x)
        model.k(x.clone())
        x.mul_(2)
        model.v(x)
    assert counted == [3]
    with torch.inference_mode():  # tensors without a version
        y = torch.randn(20, 16)
        first = model.q(y)
        assert torch.equal(model.k(y), Attention().k(y))  # alone: one operation
        y.mul_(2)
        assert not torch.equal(model.q(y), first)
    assert counted == [3 + 3]


def test_loading_other_numbers_parts_the_site() -> None:
    model = Attention()
    share_inputs(model)
    model.load_state_dict(model.state_dict())
    assert model.q.site is None


@pytest.mark.parametrize("transform", [None, "hadamard"])
@pytest.mark.parametrize("tokens", [2, 20])
def test_it_compiles_into_one_graph(tokens: int, transform: str | None) -> None:
    model, x = Attention(transform), torch.randn(tokens, 16)
    share_inputs(model)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert all(torch.equal(a, b) for a, b in zip(compiled(x), model(x), strict=True))
