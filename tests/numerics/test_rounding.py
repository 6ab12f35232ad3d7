"""Rounding against the paper's formulas, exhaustively at the interesting places, and at random."""

import numpy as np
import pytest
import torch
from paper import ALL_FORMATS, largest, quantize, values
from torch import Tensor

from llm_fp4.errors import NonFiniteError
from llm_fp4.numerics import FloatFormat, decode, encode, encode_levels, fake_quantize, levels, parse, round_to_level, scale_of_max


def places(fmt: FloatFormat) -> Tensor:
    """Return every level, every midpoint, their float32 neighbours, and points beyond the largest, of both signs."""
    grid = levels(fmt).double().unique()
    grid = grid[grid >= 0]
    x = torch.cat((grid, (grid[1:] + grid[:-1]) / 2, grid[-1] * torch.tensor([1.01, 1.5, 2.0, 1e4]))).float()
    up, down = torch.nextafter(x, torch.tensor(torch.inf)), torch.nextafter(x, torch.tensor(-torch.inf))
    x = torch.cat((x, up, down))
    return torch.cat((x, -x))


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_every_code_survives_decode_and_encode(fmt: FloatFormat) -> None:
    codes = torch.arange(2**fmt.bits, dtype=torch.uint8)
    level = decode(codes, fmt)
    assert level.dtype == torch.float32
    assert level.tolist() == levels(fmt).tolist()
    expected = torch.where(level == 0, torch.zeros_like(codes), codes)  # zero has one code
    assert torch.equal(encode(level, fmt), expected)
    assert torch.equal(encode_levels(level, fmt), expected)
    assert torch.equal(round_to_level(level, fmt), level)


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_rounding_is_eq_8_and_9_at_every_level_and_tie(fmt: FloatFormat) -> None:
    """At the bias whose step is 1 everything is exact, ties included."""
    x = places(fmt)
    paper = quantize(x.numpy(), fmt, bias=1.0 - fmt.mantissa_bits)
    np.testing.assert_array_equal(round_to_level(x, fmt).numpy(), paper)
    np.testing.assert_array_equal(decode(encode(x, fmt), fmt).numpy(), paper)


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_rounding_is_nearest_by_search_over_all_values(fmt: FloatFormat) -> None:
    x = places(fmt).double()
    grid = torch.from_numpy(values(fmt, bias=1.0 - fmt.mantissa_bits))
    best = (x[:, None] - grid).abs().amin(1)
    torch.testing.assert_close((x - round_to_level(x.float(), fmt).double()).abs(), best, rtol=0, atol=0)


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
@pytest.mark.parametrize("bias", [0.0, 3.7, -2.25, 11.913])
def test_fake_quantize_is_eq_8_and_9_at_a_real_bias(fmt: FloatFormat, bias: float) -> None:
    """Away from ties, where float32 and float64 may part, both give the same value to float32 rounding."""
    generator = torch.Generator().manual_seed(0)
    top = largest(fmt, bias)
    spread = torch.exp2(-12 * torch.rand(4000, generator=generator, dtype=torch.float64))
    x = (torch.randn(4000, generator=generator, dtype=torch.float64) * top * spread).float()
    ours = fake_quantize(x, fmt.scale_of_bias(bias).float(), fmt).double().numpy()
    paper, grid = quantize(x.numpy(), fmt, bias), np.unique(values(fmt, bias))
    middle = (grid[1:] + grid[:-1]) / 2
    away = (np.abs(x.double().numpy()[:, None] - middle) > 1e-6 * np.abs(middle)).all(1)
    assert away.mean() > 0.99
    np.testing.assert_allclose(ours[away], paper[away], rtol=3e-7, atol=0)


@pytest.mark.parametrize("name", ["e2m1", "e3m0", "e1m2", "ue2m2", "e4m3"])
def test_the_reciprocal_is_taken_in_float32(name: str) -> None:
    """The rule is x times the rounded reciprocal, not x divided by the scale; numpy does the same two operations."""
    fmt = parse(name)
    scale = torch.rand(997, generator=torch.Generator().manual_seed(1)) + 0.05
    grid = levels(fmt).float().unique()
    x = ((grid[1:] + grid[:-1]) / 2)[:, None] * scale  # at the ties, where the two differ
    steps = x.numpy() * (np.float32(1) / scale.numpy())
    assert steps.dtype == np.float32
    expected = quantize(steps, fmt, bias=1.0 - fmt.mantissa_bits).astype(np.float32) * scale.numpy()
    np.testing.assert_array_equal(fake_quantize(x, scale, fmt).numpy(), expected)
    by_division = quantize(x.numpy() / scale.numpy(), fmt, bias=1.0 - fmt.mantissa_bits).astype(np.float32) * scale.numpy()
    assert (by_division != expected).any()  # so the ties above do tell the two rules apart


def test_ties_by_hand() -> None:
    e2m1 = round_to_level(torch.tensor([0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0, -5.0, 13.0]), parse("e2m1"))
    assert e2m1.tolist() == [0, 2, 2, 4, 4, 8, 8, -4, 12]
    e3m0 = round_to_level(torch.tensor([0.5, 1.5, 3.0, 6.0, 12.0, 48.0]), parse("e3m0"))
    assert e3m0.tolist() == [0, 2, 4, 8, 16, 64]  # half to even in units of the spacing is upwards


def test_unsigned_formats_send_negatives_to_zero() -> None:
    x = torch.tensor([-5.0, -0.1, 0.0, 2.4])
    assert round_to_level(x, parse("ue2m2")).tolist() == [0, 0, 0, 2]
    assert encode(x, parse("ue2m2")).tolist() == [0, 0, 0, 2]


def test_round_to_level_keeps_its_argument_and_nan() -> None:
    x = torch.tensor([5.25, float("nan"), float("inf"), float("-inf")])
    out = round_to_level(x, parse("e2m1"))
    assert float(x[0]) == 5.25
    assert torch.isnan(out[1])
    assert out[[0, 2, 3]].tolist() == [6, 12, -12]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_round_as_float32(dtype: torch.dtype) -> None:
    x = torch.linspace(-15, 15, 333).to(dtype)
    out = fake_quantize(x, torch.tensor(0.7), parse("e2m1"))
    assert out.dtype == torch.float32
    assert torch.equal(out, fake_quantize(x.float(), torch.tensor(0.7), parse("e2m1")))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_not_a_number_names_tensor_and_place(bad: float) -> None:
    x = torch.zeros(3, 4)
    x[1, 2] = bad
    x[2, 0] = bad
    with pytest.raises(NonFiniteError, match=r"blocks\.3\.down_proj\.weight holds 2 values .* the first at \(1, 2\)"):
        encode(x, parse("e2m1"), "blocks.3.down_proj.weight")


def test_scale_of_max_reaches_the_maximum_and_is_one_at_zero() -> None:
    top = torch.tensor([12.0, 0.0, 6.0])
    assert scale_of_max(top, parse("e2m1")).tolist() == [1.0, 1.0, 0.5]
    assert float(scale_of_max(torch.tensor(0.0), parse("e3m0"))) == 1.0


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
@pytest.mark.parametrize("tiny", [2.0**-149, 2.0**-130, 1e-38])
def test_a_tiny_maximum_gives_finite_results(fmt: FloatFormat, tiny: float) -> None:
    x = torch.tensor([tiny, -tiny, tiny / 2, 0.0])
    scale = scale_of_max(x.abs().amax(), fmt)
    out = fake_quantize(x, scale, fmt)
    assert bool(torch.isfinite(1.0 / scale))
    assert float(scale) > 0
    assert bool(torch.isfinite(out).all())
    assert bool((out.abs() <= fmt.max_level * scale).all())
