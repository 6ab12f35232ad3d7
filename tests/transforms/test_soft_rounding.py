"""Layers whose rounding is learned start as the quantized ones, stay on the grid, and pass gradients of what they compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm_fp4.kernels import quantize_input
from llm_fp4.kernels.hadamard import hadamard_reference
from llm_fp4.kernels.simulate import fake_quantize_input
from llm_fp4.numerics import FloatFormat, PerBlock, formats_of_width, levels, max_scale, quantize_tensor, scale_of_max, second_scale
from llm_fp4.plan import InputPlan, InputSpec, WeightPlan
from llm_fp4.transforms import SoftRoundedLinear, SoftSite

CPU = torch.device("cpu")
E2M1 = FloatFormat(2, 1)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def row_plan(weight: Tensor, fmt: FloatFormat) -> WeightPlan:
    return WeightPlan("up", fmt, scale_of_max(weight.abs().amax(1), fmt) * 0.9)


@pytest.mark.parametrize("fmt", [*formats_of_width(4), *formats_of_width(3), FloatFormat(4, 3)], ids=str)
def test_it_starts_as_the_quantized_weight_and_stays_on_the_grid(fmt: FloatFormat) -> None:
    weight = drawn(12, 40)
    plan = row_plan(weight, fmt)
    chosen = quantize_tensor(weight + 0.05 * drawn(12, 40, seed=1), plan.scale, fmt, plan.granularity).dequantize()
    layer = SoftRoundedLinear(weight, chosen, plan, None, SoftSite(None, CPU))
    torch.testing.assert_close(layer.learned()[0], chosen, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(layer(torch.eye(40)).t(), chosen, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        layer.logit.neg_()
    moved, scale = layer.learned()
    again = quantize_tensor(moved, scale, fmt, plan.granularity).dequantize()
    torch.testing.assert_close(again, moved, rtol=1e-6, atol=1e-7)
    # every value not beyond the grid moved, to the next level towards the float weight
    step, top = plan.step(40), fmt.max_level
    inside = (weight / step).abs() < top
    order = levels(fmt).float().unique()
    places = [torch.searchsorted(order, torch.round(v / step)) for v in (chosen, moved)]
    assert torch.equal((places[1] - places[0])[inside], torch.where(weight >= chosen, 1, -1)[inside])


def test_it_cools_from_the_float_weight_to_the_grid() -> None:
    weight = drawn(12, 40)
    plan = row_plan(weight, E2M1)
    chosen = quantize_tensor(weight, plan.scale, E2M1, plan.granularity).dequantize()
    layer = SoftRoundedLinear(weight, chosen, plan, None, SoftSite(None, CPU))
    distances = []
    for layer.temperature in (1.0, 0.1, 0.01):
        value = layer(torch.eye(40)).t().detach()
        distances.append([float((value - w).abs().mean()) for w in (weight, chosen)])
    assert distances[0][0] < 0.2 * distances[2][0]
    assert distances[2][1] < 0.2 * distances[0][1]
    layer(drawn(3, 40)).sum().backward()
    assert layer.logit.grad is not None
    assert layer.log_scale.grad is not None


@pytest.mark.parametrize("blocks", [PerBlock(16, "e4m3"), PerBlock(32, "e8m0")], ids=lambda b: b.name)
def test_block_scales_stay(blocks: PerBlock) -> None:
    weight = drawn(6, 64)
    second = second_scale(weight.abs().amax(), E2M1) if blocks.two_level else None
    scale = max_scale(weight.view(6, -1, blocks.block_size).abs().amax(2), second, E2M1, blocks)
    plan = WeightPlan("up", E2M1, scale, granularity=blocks, second_scale=second)
    chosen = quantize_tensor(weight, scale, E2M1, blocks, second_scale=second).dequantize()
    layer = SoftRoundedLinear(weight, chosen, plan, None, SoftSite(None, CPU))
    assert not layer.scales_learn
    layer.temperature = 0.5
    layer(drawn(3, 64)).sum().backward()
    assert layer.log_scale.grad is None
    with torch.no_grad():
        layer.logit.neg_()
    values, kept = layer.learned()
    assert torch.equal(kept.view(torch.uint8), scale.view(torch.uint8))
    assert not torch.equal(values, chosen)
    assert torch.equal(quantize_tensor(values, scale, E2M1, blocks, second_scale=second).dequantize(), values)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_token"])
@pytest.mark.parametrize("fmt", [*formats_of_width(4), FloatFormat(2, 2, signed=False)], ids=str)
def test_an_input_is_rounded_as_its_plan_says(fmt: FloatFormat, granularity: str) -> None:
    x = drawn(9, 24).abs() if not fmt.signed else drawn(9, 24)
    ratio = torch.tensor(0.9 if granularity == "per_token" else 2.5 / fmt.max_level)
    plan = InputPlan("up", ["up"], InputSpec(fmt, granularity, max_shift=2), ratio, (torch.arange(24) % 3).to(torch.uint8))
    site = SoftSite(plan, CPU)
    torch.testing.assert_close(site(x), fake_quantize_input(x, plan.spec, plan.scale, plan.shift, None), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        site.log_scale += 0.25
    site.forget()
    changed = site.learned()
    assert changed is not None
    levels, steps = quantize_input(
        x, changed.scale, plan.shift, None, fmt.exponent_bits, fmt.mantissa_bits, fmt.signed, 2, granularity == "per_token"
    )
    torch.testing.assert_close(site(x), levels.float() * steps.reshape(-1, 1), rtol=1e-4, atol=1e-5)


def test_offset_transform_and_block_scales_of_an_input() -> None:
    x, offset = drawn(5, 32), drawn(32, seed=1)
    plan = InputPlan("up", ["up"], InputSpec(E2M1, transform="hadamard", offset=True), torch.tensor(0.3), offset=offset)
    expected = fake_quantize_input(hadamard_reference(x) - offset, plan.spec, plan.scale, None, None)
    torch.testing.assert_close(SoftSite(plan, CPU)(x), expected, rtol=1e-5, atol=1e-6)
    blocked = InputPlan("up", ["up"], InputSpec(E2M1, "per_block_16_e8m0"), torch.tensor(1.0))
    site = SoftSite(blocked, CPU)
    torch.testing.assert_close(site(x), fake_quantize_input(x, blocked.spec, blocked.scale, None, None), rtol=1e-6, atol=1e-7)
    assert site.learned() is blocked


def test_gradients_pass_the_transform() -> None:
    x, y = drawn(4, 24).requires_grad_(), drawn(4, 24).requires_grad_()
    wide = InputPlan("up", ["up"], InputSpec(FloatFormat(1, 6), transform="hadamard"), torch.tensor(0.05))
    direction = drawn(4, 24, seed=3)
    (SoftSite(wide, CPU)(x) * direction).sum().backward()
    (hadamard_reference(y) * direction).sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-6)


def test_siblings_share_one_rounded_input() -> None:
    plan = InputPlan("up", ["up", "gate"], InputSpec(E2M1), torch.tensor(0.3))
    site, x = SoftSite(plan, CPU), drawn(3, 8)
    assert site(x) is site(x)
    site.forget()
    assert site(drawn(3, 8, seed=1)) is not site(x)
