"""The reference operations against integers computed in int64 and against the fake-quantized simulation in float64."""

import itertools

import pytest
import torch
from torch import Tensor

from llm_fp4.errors import UnsupportedError
from llm_fp4.kernels import accumulate, float_linear, int_linear, integer_product, quantize_input, token_scale
from llm_fp4.numerics import (
    FloatFormat,
    PerRow,
    QuantizedTensor,
    fake_quantize,
    formats_of_width,
    parse,
    quantize_tensor,
    scale_of_max,
)

FOUR = ["e1m2", "e2m1", "e3m0"]
# float32(acc), step * weight_scale, their product, the bias, and one rounding each of the simulated x and w
ROUNDING = 6 * 2.0**-24


def make(tokens: int, inner: int, out: int, weight: str, seed: int = 0) -> tuple[Tensor, QuantizedTensor, Tensor]:
    """Return inputs whose channels differ 500-fold in magnitude, a quantized weight and a bias."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inner, generator=generator) * torch.exp2(9 * torch.rand(inner, generator=generator) - 5)
    fmt = parse(weight)
    w = torch.randn(out, inner, generator=generator) * 0.05
    top = PerRow().absmax(w) if inner else torch.zeros(out)
    return x, quantize_tensor(w, scale_of_max(top, fmt), fmt, PerRow()), torch.randn(out, generator=generator)


def shifts(x: Tensor, limit: int) -> Tensor:
    """Return k of Eq. 14-15 from each channel's own maximum: the smaller the channel, the larger k."""
    top = x.abs().amax(0)
    return torch.log2(top.max() / top).round().clamp(0, limit).to(torch.uint8)


def quantize(x: Tensor, scale: Tensor, fmt: FloatFormat, shift: Tensor | None = None, smooth: Tensor | None = None, *,
             max_shift: int = 0, per_token: bool = False) -> tuple[Tensor, Tensor]:  # fmt: skip
    return quantize_input(x, scale, shift, smooth, fmt.exponent_bits, fmt.mantissa_bits, fmt.signed, max_shift, per_token)


def multiply(levels: Tensor, step: Tensor, w: QuantizedTensor, bias: Tensor | None) -> Tensor:
    return int_linear(levels, step, w.packed, w.scale, bias, w.format.exponent_bits, w.format.mantissa_bits)


def assert_simulated(out: Tensor, x_fake: Tensor, w: QuantizedTensor, bias: Tensor | None) -> None:
    """``out`` is the float64 product of the fake-quantized operands but for float32 roundings."""
    a, b = x_fake.double(), w.dequantize().double()
    offset = torch.zeros(len(b)) if bias is None else bias
    expected = a @ b.t() + offset.double()
    bound = ROUNDING * (a.abs() @ b.abs().t() + offset.double().abs())
    assert out.dtype == torch.float32
    assert out.shape == expected.shape
    assert bool(((out.double() - expected).abs() <= bound).all())


def assert_exact(out: Tensor, levels: Tensor, step: Tensor, w: QuantizedTensor, bias: Tensor | None) -> None:
    """The sums equal an int64 product and the epilogue is float32(acc) * (step * scale) + bias."""
    weight = (w.dequantize().double() / w.scale.double()[:, None]).round().long()
    exact = levels.long() @ weight.t()
    assert torch.equal(accumulate(levels, weight.to(torch.int8)).long(), exact)
    expected = exact.float() * (step * w.scale)
    assert torch.equal(out, expected if bias is None else expected + bias)


PAIRS = [*itertools.product(FOUR, FOUR), *itertools.product(["e1m6"], [*FOUR, "e1m6"]), ("ue2m2", "e2m1"), ("ue1m3", "e1m2")]


@pytest.mark.parametrize("shifted", [False, True], ids=["static", "shifted"])
@pytest.mark.parametrize(("activation", "weight"), PAIRS)
def test_integer_path_is_the_simulation(activation: str, weight: str, shifted: bool) -> None:
    """All nine 4-bit pairs, W4A8 and W8A8 in E1M6, and unsigned inputs; the paper's shift range and one beyond int8."""
    fmt = parse(activation)
    x, w, bias = make(5, 37, 11, weight)
    if not fmt.signed:
        x = x.abs()
    limit = fmt.max_shift if shifted else 0
    shift = shifts(x, limit) if shifted else None
    scale = scale_of_max(x.abs().amax(), fmt)
    levels, step = quantize(x, scale, fmt, shift, max_shift=limit)
    # E3M0 reaches 64 << 7 = 8192, E1M6 127 << 1: two limbs; the others at most 12 << 3 = 96: one
    assert levels.dtype == (torch.int8 if fmt.max_level << limit <= 127 else torch.int16)
    assert step.tolist() == [[float(scale) * 2.0**-limit]] * 5
    if shifted:
        assert int(shift.max()) == limit  # the data does use the whole range
    x_fake = fake_quantize(x, scale * torch.exp2(-(shift if shifted else torch.zeros(37)).float()), fmt)
    assert torch.equal(levels.double() * step.double(), (x_fake.double() / scale * 2**limit).round() * scale * 2.0**-limit)
    for b in (None, bias):
        out = multiply(levels, step, w, b)
        assert_exact(out, levels, step, w, b)
        assert_simulated(out, x_fake, w, b)


@pytest.mark.parametrize("limit", [0, 2, 5, 7])
@pytest.mark.parametrize("activation", [*FOUR, "e1m6"])
def test_per_token(activation: str, limit: int) -> None:
    """Each row is quantized as if it were alone, with its own step; a zero row has one too."""
    fmt, ratio = parse(activation), torch.tensor(0.8)
    x, w, bias = make(6, 24, 7, "e2m1", seed=limit)
    x[2] = 0
    x[3] *= 1e4
    shift = shifts(x, limit) if limit else None
    factor = torch.exp2(shift.float()) if limit else torch.ones(24)
    levels, step = quantize(x, ratio, fmt, shift, max_shift=limit, per_token=True)
    base = (x * factor).abs().amax(1, keepdim=True) * (ratio / fmt.max_level)
    base[2] = 1
    torch.testing.assert_close(step, base * 2.0**-limit, rtol=0, atol=0)
    assert torch.equal(token_scale(x, ratio, shift, None, fmt.max_level), base)
    assert bool((levels[2] == 0).all())
    out = multiply(levels, step, w, bias)
    assert torch.equal(out[2], bias)
    assert_exact(out, levels, step, w, bias)
    assert_simulated(out, fake_quantize(x, base / factor, fmt), w, bias)
    for row in range(6):
        alone, _ = quantize(x[row : row + 1], ratio, fmt, shift, max_shift=limit, per_token=True)
        assert torch.equal(alone[0], levels[row])


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("limit", [0, 3])
def test_smooth_divides_the_input_first(limit: int, per_token: bool) -> None:
    """With powers of two the division is exact, so the result is that of the divided input."""
    fmt = parse("e2m1")
    x, w, bias = make(5, 16, 4, "e2m1")
    smooth = torch.exp2(torch.arange(16).float() % 5 - 2)
    shift = shifts(x / smooth, limit) if limit else None
    scale = torch.tensor(0.9) if per_token else scale_of_max((x / smooth).abs().amax(), fmt)
    levels, step = quantize(x, scale, fmt, shift, smooth, max_shift=limit, per_token=per_token)
    plain, plain_step = quantize(x / smooth, scale, fmt, shift, max_shift=limit, per_token=per_token)
    assert torch.equal(levels, plain)
    assert torch.equal(step, plain_step)
    assert_exact(multiply(levels, step, w, bias), levels, step, w, bias)


def test_smooth_by_any_factor_is_within_a_rounding_of_division() -> None:
    fmt = parse("e1m6")
    x, _, _ = make(64, 32, 1, "e2m1")
    smooth = torch.rand(32) + 0.3
    scale = scale_of_max((x / smooth).abs().amax(), fmt)
    levels, step = quantize(x, scale, fmt, None, smooth)
    error = (levels.double() * step.double() - (x / smooth).double()).abs()
    assert bool((error <= scale.double() * (0.5 + 1e-4)).all())


@pytest.mark.parametrize("limit", [0, 3, 7])
@pytest.mark.parametrize(
    ("tokens", "inner", "out"), [(1, 1, 1), (1, 33, 5), (3, 7, 1), (0, 8, 4), (4, 0, 3), (4, 8, 0), (0, 0, 0), (17, 64, 16)]
)
@pytest.mark.parametrize("per_token", [False, True])
def test_odd_and_empty_shapes(tokens: int, inner: int, out: int, per_token: bool, limit: int) -> None:
    fmt = parse("e2m1")
    x, w, bias = make(tokens, inner, out, "e3m0")
    shift = torch.arange(inner, dtype=torch.uint8) % (limit + 1) if limit else None
    scale = torch.tensor(0.3)
    levels, step = quantize(x, scale, fmt, shift, max_shift=limit, per_token=per_token)
    assert levels.shape == x.shape
    assert step.shape == (tokens, 1)
    result = multiply(levels, step, w, bias)
    assert result.shape == (tokens, out)
    assert_exact(result, levels, step, w, bias)


@pytest.mark.parametrize(("activation", "limit"), [("e3m0", 7), ("e1m6", 7), ("e1m6", 0), ("e2m1", 3)])
@pytest.mark.parametrize("weight", ["e1m6", "e3m0"])
def test_the_largest_sums_are_exact(activation: str, limit: int, weight: str) -> None:
    """Every product at its largest, of both signs: 8,192 channels of 16,256 * 127 pass 2^31."""
    fmt, wide = parse(activation), parse(weight)
    inner = 8192
    x = torch.tensor([[1.0], [-1.0]]).expand(2, inner) * fmt.max_level
    shift = torch.zeros(inner, dtype=torch.uint8) if limit else None
    w = quantize_tensor(x * wide.max_level / fmt.max_level, torch.ones(2), wide, PerRow())
    levels, step = quantize(x, torch.tensor(1.0), fmt, shift, max_shift=limit)
    top = (fmt.max_level << limit) * wide.max_level * inner
    weight_levels = w.dequantize().to(torch.int8)
    assert accumulate(levels, weight_levels).tolist() == [[top, -top], [-top, top]]
    assert multiply(levels, step, w, None).tolist() == (torch.tensor([[top, -top], [-top, top]]).float() * step).tolist()


def test_two_limbs_hold_every_level() -> None:
    """The split into limbs is exact for all of -16383 to 16383."""
    levels = torch.arange(-16383, 16384, dtype=torch.int16)[:, None]
    weight = torch.tensor([[1], [-1], [127], [-127]], dtype=torch.int8)
    assert torch.equal(accumulate(levels, weight), levels.long() @ weight.long().t())


@pytest.mark.parametrize("inner", [1, 8, 37])
def test_strides_of_dimensions_of_size_one_do_not_matter(inner: int) -> None:
    """A single row or channel may come with any stride; reading it as a leading dimension gives garbage."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (11, inner), generator=generator, dtype=torch.int8)
    for rows in (1, 5):
        levels = torch.randint(-127, 128, (rows, inner), generator=generator, dtype=torch.int8)
        exact = levels.long() @ weight.long().t()
        odd = levels.as_strided((rows, inner), (inner if rows > 1 else 0, 1))
        assert torch.equal(accumulate(odd, weight).long(), exact)
        wide = torch.randint(-127, 128, (rows, inner + 3), generator=generator, dtype=torch.int8)
        assert torch.equal(accumulate(wide[:, :inner], weight).long(), wide[:, :inner].long() @ weight.long().t())
        tall = levels.t().contiguous().t()
        assert torch.equal(accumulate(tall, weight).long(), exact)


def test_integer_product_says_what_fits() -> None:
    eight = {f.name: integer_product(f.max_level, f) for f in formats_of_width(8)}
    assert eight == {"e1m6": True, "e2m5": False, "e3m4": False, "e4m3": False, "e5m2": False}
    four = [integer_product(a.max_level << a.max_shift, w) for a in formats_of_width(4) for w in formats_of_width(4)]
    assert four == [True] * 9
    assert integer_product(127 << 7, parse("e1m6"))
    assert not integer_product(127 << 8, parse("e1m6"))


def test_bfloat16_input_is_quantized_as_float32() -> None:
    fmt = parse("e2m1")
    x = make(4, 16, 1, "e2m1")[0].bfloat16()
    scale = torch.tensor(0.37)
    for per_token in (False, True):
        narrow, wide = quantize(x, scale, fmt, per_token=per_token), quantize(x.float(), scale, fmt, per_token=per_token)
        assert torch.equal(narrow[0], wide[0])
        assert torch.equal(narrow[1], wide[1])


@pytest.mark.parametrize("per_token", [False, True])
def test_not_a_number_reaches_every_output_of_its_row_and_infinity_saturates(per_token: bool) -> None:
    x = torch.tensor([[float("nan"), 2.0, -1.0, 1.0], [3.0, 2.0, -1.0, 1.0]])
    w = quantize_tensor(torch.ones(5, 4), torch.ones(5), parse("e2m1"), PerRow())
    levels, step = quantize(x, torch.tensor(1.0), parse("e2m1"), per_token=per_token)
    out = multiply(levels, step, w, None)
    assert bool(out[0].isnan().all())
    assert bool(out[1].isfinite().all())
    x[0, 0] = float("inf")
    x[0, 2] = float("-inf")
    assert quantize(x, torch.tensor(1.0), parse("e2m1"))[0].tolist() == [[12, 2, -12, 1], [3, 2, -1, 1]]
    assert quantize(x, torch.tensor(1.0), parse("ue2m2"))[0].tolist() == [[28, 2, 0, 1], [3, 2, 0, 1]]


def test_shifts_beyond_two_limbs_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"beyond the 16383 of two int8 limbs"):
        quantize(torch.ones(1, 2), torch.tensor(1.0), parse("e3m0"), torch.zeros(2, dtype=torch.uint8), max_shift=8)


def test_the_arguments_are_left_alone() -> None:
    x, w, bias = make(3, 8, 4, "e2m1")
    shift, scale = torch.arange(8, dtype=torch.uint8) % 4, torch.tensor(0.1)
    before = [t.clone() for t in (x, shift, scale, w.packed, w.scale, bias)]
    levels, step = quantize(x, scale, parse("e2m1"), shift, max_shift=3)
    multiply(levels, step, w, bias)
    float_linear(x, w.packed, w.scale, bias, 2, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, shift, scale, w.packed, w.scale, bias), strict=True))


@pytest.mark.parametrize("weight", ["e2m1", "e3m2", "e4m3", "e5m2", "e5m0", "e1m6"])
@pytest.mark.parametrize("shape", [(5, 37, 11), (1, 1, 1), (0, 8, 4), (4, 0, 3)])
def test_float_linear_is_the_product_of_the_decoded_weight(weight: str, shape: tuple[int, int, int]) -> None:
    """Formats too wide for integers run in float: float32 sums differ from the exact ones by their own rounding."""
    x, w, bias = make(*shape, weight)
    for b in (None, bias):
        out = float_linear(x, w.packed, w.scale, b, w.format.exponent_bits, w.format.mantissa_bits)
        a, d = x.double(), w.dequantize().double()
        offset = torch.zeros(len(d)).double() if b is None else b.double()
        bound = (shape[1] + 6) * 2.0**-24 * (a.abs() @ d.abs().t() + offset.abs())
        assert out.shape == (shape[0], shape[2])
        assert bool(((out.double() - (a @ d.t() + offset)).abs() <= bound).all())


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "transposed"])
@pytest.mark.parametrize("limit", [0, 3, 7])
@pytest.mark.parametrize("per_token", [False, True])
def test_opcheck_quantize_input(per_token: bool, limit: int, strided: bool) -> None:
    x = torch.randn(16, 6).t() if strided else torch.randn(6, 16)
    shift = torch.arange(16, dtype=torch.uint8) % (limit + 1) if limit else None
    smooth = torch.rand(16) + 0.5 if limit == 3 else None
    torch.library.opcheck(
        torch.ops.llm_fp4.quantize_input.default, (x, torch.tensor(0.5), shift, smooth, 2, 1, True, limit, per_token)
    )


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("limit", [0, 7])
def test_opcheck_linears(limit: int, with_bias: bool) -> None:
    x, w, bias = make(6, 16, 5, "e2m1")
    levels, step = quantize(x, torch.tensor(0.5), parse("e2m1"), torch.zeros(16, dtype=torch.uint8), max_shift=limit)
    b = bias if with_bias else None
    torch.library.opcheck(torch.ops.llm_fp4.int_linear.default, (levels, step, w.packed, w.scale, b, 2, 1))
    torch.library.opcheck(torch.ops.llm_fp4.float_linear.default, (x, w.packed, w.scale, b, 2, 1))
