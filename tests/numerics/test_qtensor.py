import pytest
import torch
from paper import ALL_FORMATS

from llm_fp4.errors import NonFiniteError, UnsupportedError
from llm_fp4.numerics import (
    FloatFormat,
    Granularity,
    PerBlock,
    PerChannel,
    PerRow,
    PerTensor,
    QuantizedTensor,
    encode,
    fake_quantize,
    packed_width,
    parse,
    quantize_tensor,
    scale_of_max,
)

GRANULARITIES = [PerTensor(), PerRow(), PerChannel(), PerBlock(4), PerBlock(5)]


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: g.name)
@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_round_trip_is_fake_quantize(fmt: FloatFormat, granularity: Granularity) -> None:
    for columns in (1, 7, 8, 13):
        x = torch.randn(3, columns, generator=torch.Generator().manual_seed(columns))
        scale = scale_of_max(granularity.absmax(x), fmt)
        wide = granularity.expand(scale, (3, columns))
        q = quantize_tensor(x, scale, fmt, granularity)
        assert torch.equal(q.dequantize(), fake_quantize(x, wide, fmt))
        assert torch.equal(q.codes, encode(x * (1.0 / wide), fmt))
        assert q.packed.shape == (3, packed_width(columns, fmt.bits))
        assert q.nbytes == 3 * packed_width(columns, fmt.bits) + 4 * scale.numel()


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 7, 8])
def test_storage_is_dense(bits: int) -> None:
    """Eight codes fill as many bytes as a code has bits: 4-bit tensors take 4 bits an element, 6-bit ones 6."""
    fmt = parse(f"int{bits}")
    q = quantize_tensor(torch.randn(16, 64), torch.tensor(0.1), fmt, PerTensor())
    assert q.packed.nbytes == 16 * 64 * bits // 8


def test_quantizing_the_dequantized_tensor_changes_nothing() -> None:
    fmt, rows = parse("e2m1"), PerRow()
    x = torch.randn(5, 11)
    first = quantize_tensor(x, scale_of_max(rows.absmax(x), fmt), fmt, rows)
    again = quantize_tensor(first.dequantize(), first.scale, fmt, rows)
    assert torch.equal(again.packed, first.packed)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0), (0, 5)])
def test_empty_tensors(shape: tuple[int, int]) -> None:
    q = quantize_tensor(torch.empty(shape), torch.tensor(1.0), parse("e3m2"), PerTensor())
    assert q.dequantize().shape == shape


def test_finite_values_saturate_even_where_the_quotient_overflows() -> None:
    q = quantize_tensor(torch.tensor([[1e38, -1e38, 0.0]]), torch.tensor(2.0**-120), parse("e2m1"), PerTensor())
    assert q.codes.tolist() == [[7, 15, 0]]


def test_not_a_number_names_the_tensor_and_the_place() -> None:
    x = torch.zeros(2, 3)
    x[1, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"lm_head\.weight holds 1 values .* the first at \(1, 0\)"):
        quantize_tensor(x, torch.ones(2), parse("e2m1"), PerRow(), name="lm_head.weight")
    with pytest.raises(NonFiniteError, match=r"the scale of lm_head\.weight .* the first at \(1,\)"):
        quantize_tensor(torch.zeros(2, 3), torch.tensor([1.0, torch.nan]), parse("e2m1"), PerRow(), name="lm_head.weight")


@pytest.mark.parametrize("scale", [0.0, -1.0, 2.0**-149])
def test_an_impossible_scale_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=r"the scale of lm_head\.weight"):
        quantize_tensor(torch.zeros(2, 3), torch.tensor(scale), parse("e2m1"), PerTensor(), name="lm_head.weight")


def test_a_packed_tensor_that_contradicts_its_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"packed is \(2, 3\), which does not hold \(2, 7\) in e2m1"):
        QuantizedTensor(torch.zeros(2, 3, dtype=torch.uint8), torch.tensor(1.0), parse("e2m1"), PerTensor(), (2, 7))


def test_a_second_scale_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="second_scale"):
        QuantizedTensor(
            torch.zeros(2, 4, dtype=torch.uint8), torch.tensor(1.0), parse("e2m1"), PerTensor(), (2, 7), torch.tensor(1.0)
        )
