"""Integer products are exact with int8 units and without."""

from __future__ import annotations

import pytest
import torch

from llm_fp4.numerics import int8, int8_product


@pytest.fixture(params=[True, False], ids=["int8 units", "float32"])
def units(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either way of a CPU to multiply, whatever this one has."""
    monkeypatch.setattr(int8, "cpu_multiplies_int8", lambda: request.param)


@pytest.mark.usefixtures("units")
@pytest.mark.parametrize("inner", [0, 1, 37, 1024, 1025, 3000])
def test_products_are_exact(inner: int) -> None:
    generator = torch.Generator().manual_seed(inner)
    a, b = (torch.randint(-128, 128, (n, inner), generator=generator).to(torch.int8) for n in (5, 9))
    a[0], b[0], b[1] = -128, -128, 127  # the largest sums of either sign, which one piece of float32 just holds
    found = int8_product(a, b)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), a.long() @ b.long().t())


@pytest.mark.usefixtures("units")
def test_transposed_operands() -> None:
    """What Gram matrices are summed from: columns of one matrix."""
    rows = torch.arange(-127, 128).to(torch.int8).repeat(8).view(40, 51)
    found = int8_product(rows[:, 3:20].t(), rows[:, 3:].t())
    assert torch.equal(found.long(), rows[:, 3:20].long().t() @ rows[:, 3:].long())
