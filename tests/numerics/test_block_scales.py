"""Stored scales of blocks against the types of ml_dtypes, and the largest-magnitude rules against arithmetic by hand."""

import ml_dtypes
import numpy as np
import pytest
import torch

from llm_fp4.errors import RecipeError, UnsupportedError
from llm_fp4.numerics import (
    PerBlock,
    PerTensor,
    QuantizedTensor,
    block_step,
    fake_quantize,
    max_scale,
    neighbour,
    parse,
    parse_granularity,
    quantize_tensor,
    scale_values,
    second_scale,
    store_scale,
)

E2M1 = parse("e2m1")
NVFP4, MXFP4, HALF = PerBlock(16, "e4m3"), PerBlock(32, "e8m0"), PerBlock(32, "float16")
ALL = pytest.mark.parametrize("blocks", [NVFP4, MXFP4, HALF], ids=lambda b: b.name)


def test_e4m3_scales_round_as_ml_dtypes_and_saturate() -> None:
    x = torch.cat((torch.linspace(0, 500, 40001), torch.logspace(-12, 3, 1000)))
    stored = store_scale(x, NVFP4)
    expected = np.minimum(x.numpy(), 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(stored.view(torch.uint8).numpy(), expected.view(np.uint8))
    np.testing.assert_array_equal(scale_values(stored).numpy(), expected.astype(np.float32))


def test_every_e8m0_code_is_that_of_ml_dtypes() -> None:
    codes = np.arange(256, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(scale_values(torch.from_numpy(codes)).numpy(), expected)


@pytest.mark.parametrize(
    ("absmax", "scale"),
    [(6.0, 1.0), (4.0, 1.0), (6.999, 1.0), (7.0, 2.0), (8.0, 2.0), (3.49, 0.5), (3.5, 1.0), (0.0, 1.0), (1e-45, 2.0**-125)],
)
def test_e8m0_scale_of_the_largest_magnitude(absmax: float, scale: float) -> None:
    """7 is half way between the largest value 6 and 8, which the next scale holds."""
    stored = max_scale(torch.tensor([absmax]), None, E2M1, MXFP4)
    assert scale_values(stored).item() == scale


@pytest.mark.parametrize("absmax", [1e-20, 0.003, 1.0, 447.0, 3e9])
def test_second_scale_is_a_power_of_two_with_room_to_map_the_largest_to_four(absmax: float) -> None:
    second = second_scale(torch.tensor(absmax), E2M1)
    assert torch.frexp(second)[0].item() == 0.5
    if absmax > 1e-15:
        assert 448 / 2.01 < absmax / 4 / second.item() <= 448
    assert 1 / (1 / second) == second


@ALL
def test_neighbours_are_distinct_positive_and_ordered(blocks: PerBlock) -> None:
    start = store_scale(torch.tensor([0.75, 1.0, 3.0, 0.0]), blocks)
    moved = torch.stack([scale_values(neighbour(start, o, blocks)) for o in range(-4, 6)])
    assert bool((moved[:, :3].diff(dim=0) > 0).all())
    assert bool((moved > 0).all())
    assert torch.equal(scale_values(neighbour(start[:3], 0, blocks)), scale_values(start[:3]))
    octave = 1 if blocks is MXFP4 else 8
    assert torch.equal(scale_values(neighbour(start[:3], octave, blocks)), 2 * scale_values(start[:3]))
    each = neighbour(start[:3], torch.tensor([0, 1, 2]), blocks)
    assert torch.equal(scale_values(each)[1], scale_values(neighbour(start, 1, blocks))[1])


@ALL
@pytest.mark.parametrize("columns", [32, 37, 5])
def test_a_quantized_tensor_holds_the_grid_values(blocks: PerBlock, columns: int) -> None:
    x = torch.randn(6, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    second = second_scale(x.abs().amax(), E2M1) if blocks.two_level else None
    scale = neighbour(max_scale(blocks.absmax(x), second, E2M1, blocks), 0, blocks)
    step = blocks.expand(block_step(scale, second, E2M1), (6, columns))
    q = quantize_tensor(x, scale, E2M1, blocks, second_scale=second)
    assert q.scale.dtype == blocks.torch_dtype
    assert q.scale.shape == blocks.shape(6, columns)
    assert torch.equal(q.dequantize(), fake_quantize(x, step, E2M1))
    assert float((q.dequantize() - x).abs().max()) <= 0.2 * float(x.abs().max())
    again = quantize_tensor(q.dequantize(), scale, E2M1, blocks, second_scale=second)
    assert torch.equal(again.packed, q.packed)


def test_bits_of_a_value() -> None:
    """NVFP4 takes 4.5 bits, MXFP4 4.25."""
    x = torch.randn(8, 64)
    for blocks, bits, extra in ((NVFP4, 4.5, 4), (MXFP4, 4.25, 0)):
        second = second_scale(x.abs().amax(), E2M1) if blocks.two_level else None
        q = quantize_tensor(x, max_scale(blocks.absmax(x), second, E2M1, blocks), E2M1, blocks, second_scale=second)
        assert q.nbytes == 8 * 64 * bits / 8 + extra


@ALL
def test_names_parse_back(blocks: PerBlock) -> None:
    assert parse_granularity(blocks.name) == blocks


def test_what_is_refused() -> None:
    with pytest.raises(RecipeError, match="unknown scale_dtype 'e5m2'"):
        PerBlock(16, "e5m2")
    with pytest.raises(RecipeError, match="unknown granularity 'per_block_16_e5m2'"):
        parse_granularity("per_block_16_e5m2")
    packed, one = torch.zeros(2, 8, dtype=torch.uint8), torch.tensor(1.0)
    with pytest.raises(UnsupportedError, match="a second_scale belongs to block scales in e4m3"):
        QuantizedTensor(packed, one, E2M1, PerTensor(), (2, 16), one)
    with pytest.raises(UnsupportedError, match="a second_scale belongs to block scales in e4m3"):
        QuantizedTensor(packed, torch.ones(2, 1).to(torch.float8_e4m3fn), E2M1, NVFP4, (2, 16))
