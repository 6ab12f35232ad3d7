"""The compiled CPU kernels against the reference bodies: equal bit for bit, whatever the shape, kernel and threads."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

from llm_fp4.errors import UnsupportedError
from llm_fp4.kernels import fused, ops
from llm_fp4.kernels.compiled import available, select, selected
from llm_fp4.numerics import FloatFormat, decode, levels, pack, parse, unpack
from llm_fp4.plan import TWO_LIMBS

KERNELS = available()[:-1]
FOUR_BITS = ("e1m2", "e2m1", "e3m0")
INPUTS = (*FOUR_BITS, "e1m6", "ue2m2", "e1m4", "e2m3")

pytestmark = pytest.mark.skipif(not KERNELS, reason="this installation has no compiled CPU kernels; build it with a C++ compiler")


@pytest.fixture(params=KERNELS or ["torch"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    threads = torch.get_num_threads()
    yield select(request.param)
    torch.set_num_threads(threads)
    select()


def most_shift(fmt: FloatFormat) -> int:
    return max(k for k in range(8) if fmt.max_level << k <= TWO_LIMBS)


def check_quantize(x: Tensor, scale: float, shift: Tensor | None, smooth: Tensor | None, fmt: FloatFormat, max_shift: int) -> None:
    for per_token in (False, True):
        arguments = (
            x, torch.tensor(scale), shift, smooth, fmt.exponent_bits, fmt.mantissa_bits, fmt.signed, max_shift, per_token
        )  # fmt: skip
        got, step = ops.quantize_input(*arguments)
        want, want_step = ops.quantize_input_reference(*arguments)
        assert got.dtype == want.dtype
        assert torch.equal(got, want)
        assert torch.equal(step.nan_to_num(), want_step.nan_to_num())
        assert torch.equal(step.isnan(), want_step.isnan())


def random_weight(out: int, width: int, fmt: FloatFormat) -> Tensor:
    return pack(torch.randint(0, 2**fmt.bits, (out, width), dtype=torch.uint8), fmt.bits)


@pytest.mark.parametrize("name", INPUTS)
def test_quantize_input_equals_the_reference(kernel: str, name: str) -> None:
    fmt = parse(name)
    torch.manual_seed(INPUTS.index(name))
    shapes = ((1, 1), (3, 130), (0, 7), (5, 0), (700, 77))
    for max_shift, (tokens, width), threads in product((0, 1, most_shift(fmt)), shapes, (1, 2, 3)):
        torch.set_num_threads(threads)
        x = torch.randn(tokens, width) * torch.logspace(-2, 2, max(width, 1))[:width]
        shift = torch.randint(0, max_shift + 1, (width,), dtype=torch.uint8) if max_shift else None
        smooth = torch.rand(width) + 0.2 if threads == 2 else None
        check_quantize(x, 0.37, shift, smooth, fmt, max_shift)
        check_quantize(x.bfloat16(), 0.37, shift, smooth, fmt, max_shift)
        check_quantize(x.half().t().contiguous().t(), 0.37, shift, smooth, fmt, max_shift)


@pytest.mark.parametrize("name", INPUTS)
def test_quantize_input_rounds_a_million_boundary_values_as_the_reference_does(kernel: str, name: str) -> None:
    fmt = parse(name)
    generator = torch.Generator().manual_seed(7)
    grid = levels(fmt).double().unique()
    boundary = torch.cat((grid, (grid[1:] + grid[:-1]) / 2, 4 * grid))  # levels, ties and what saturates
    max_shift, width = min(3, most_shift(fmt)), 4096
    shift = torch.randint(0, max_shift + 1, (width,), dtype=torch.uint8, generator=generator)
    for scale in (1.0, 0.37, 3.1e-5):
        pick = boundary[torch.randint(0, len(boundary), (84, width), generator=generator)]
        x = (pick * scale / 2.0 ** shift.double()).float()
        nudge = torch.randint(-3, 4, x.shape, generator=generator).int()  # some units in the last place off
        x = torch.where(x == 0, x, (x.view(torch.int32) + nudge).view(torch.float32))
        x.view(-1)[::997] = torch.tensor(
            [float("nan"), float("inf"), -float("inf"), 1e-45, -0.0, 3.4e38]
        ).repeat(x.numel())[: -(-x.numel() // 997)]  # fmt: skip
        check_quantize(x, scale, shift, None, fmt, max_shift)
        check_quantize(x.nan_to_num(0.0, 1.0, -1.0), 0.9, shift, None, fmt, max_shift)


def test_a_row_of_zeros_or_subnormals_has_the_references_step(kernel: str) -> None:
    x = torch.zeros(3, 40)
    x[1], x[2, 5] = 1e-42, 1e-30
    check_quantize(x, 1.0, None, None, parse("e2m1"), 0)


@pytest.mark.parametrize("name", [*FOUR_BITS, "e1m6"])
def test_int_linear_equals_the_reference(kernel: str, name: str) -> None:
    fmt = parse(name)
    torch.manual_seed(11)
    choose = random.Random(f"{kernel} {name}")
    shapes = [(1, 1, 1), (0, 5, 3), (4, 0, 3), (40, 0, 3), (2, 3, 0), (8, 129, 65), (9, 128, 64), (200, 131, 70)]
    shapes += [(1030, 65, 3), (1, 4097, 33), (17, 9000, 66)]
    shapes += [(choose.choice((1, 2, 5, 8, 12, 40)), choose.randrange(1, 900), choose.randrange(1, 200)) for _ in range(12)]
    for (tokens, width, out), top in product(shapes, (96, 127, TWO_LIMBS)):
        torch.set_num_threads(choose.choice((1, 2, 3)))
        dtype = torch.int8 if top <= 127 else torch.int16
        x = torch.randint(-top, top + 1, (tokens, width)).to(dtype)
        step = torch.rand(choose.choice((1, tokens)), 1) + 0.01
        bias = torch.randn(out) if choose.random() < 0.5 else None
        arguments = (x, step, random_weight(out, width, fmt), torch.rand(out) + 0.01, bias, fmt.exponent_bits, fmt.mantissa_bits)
        assert torch.equal(ops.int_linear(*arguments), ops.int_linear_reference(*arguments)), (tokens, width, out, top)


@pytest.mark.parametrize("name", [*FOUR_BITS, "e1m6"])
def test_the_largest_sums_are_exact(kernel: str, name: str) -> None:
    fmt = parse(name)
    width = 131072 // 2
    lowest = torch.full((3, width), 2 ** (fmt.bits - 1) + 2 ** (fmt.bits - 1) - 1, dtype=torch.uint8)
    for x in (torch.full((1, width), -127, dtype=torch.int8), torch.full((10, width), 127, dtype=torch.int8)):
        arguments = (x, torch.ones(1, 1), pack(lowest, fmt.bits), torch.ones(3), None, fmt.exponent_bits, fmt.mantissa_bits)
        want = float(x[0, 0]) * -fmt.max_level * width
        assert torch.equal(ops.int_linear(*arguments), torch.full((len(x), 3), want))


@pytest.mark.parametrize("name", FOUR_BITS)
def test_float_linear_differs_from_float64_no_more_than_float32_sums_do(kernel: str, name: str) -> None:
    fmt = parse(name)
    torch.manual_seed(13)
    shapes = ((1, 1, 1), (2, 577, 70), (5, 2050, 33), (11, 128, 64), (3, 0, 4), (300, 3000, 9), (40, 130, 70), (23, 77, 3))
    for (tokens, width, out), threads, dtype in product(shapes, (1, 2), (torch.float32, torch.bfloat16)):
        torch.set_num_threads(threads)
        x, weight, scale, bias = torch.randn(tokens, width), random_weight(out, width, fmt), torch.rand(out) + 0.1, torch.randn(out)
        x = x.to(dtype)
        got = ops.float_linear(x, weight, scale, bias, fmt.exponent_bits, fmt.mantissa_bits)
        exact = x.double() @ decode(unpack(weight, 4, width), fmt).double().t() * scale + bias
        largest = float(x.abs().max()) * fmt.max_level if x.numel() else 0.0
        bound = 2e-6 * (width + 1) ** 0.5 * largest * scale + 1e-6 * (1 + bias.abs())
        assert bool(((got - exact).abs() <= bound).all()), (tokens, width, out)


@pytest.mark.parametrize("name", [*FOUR_BITS, "e1m6"])
def test_one_operation_equals_its_two_halves(kernel: str, name: str) -> None:
    fmt = parse(name)
    torch.manual_seed(17)
    for (tokens, width, out), limit, per_token in product(
        ((1, 130, 70), (9, 33, 5), (0, 4, 3), (70, 257, 9)), (0, 1), (False, True)
    ):
        x, shift = torch.randn(tokens, width), torch.randint(0, limit + 1, (width,), dtype=torch.uint8) if limit else None
        rounding = (torch.tensor(0.4), shift, None, fmt.exponent_bits, fmt.mantissa_bits, True, limit, per_token)
        bias = torch.randn(out) if limit else None
        weight = (random_weight(out, width, fmt), torch.rand(out), bias, fmt.exponent_bits, fmt.mantissa_bits)
        for source in (x, x.bfloat16()):
            halves = ops.int_linear_reference(*ops.quantize_input_reference(source, *rounding), *weight)
            assert torch.equal(fused.quantized_linear(source, *rounding, *weight), halves)
    torch.library.opcheck(fused.quantized_linear, (x, *rounding, *weight))


def test_uncovered_formats_run_the_reference(kernel: str) -> None:
    torch.manual_seed(3)
    for name in ("e2m3", "e1m4", "e1m1", "e2m4"):
        fmt = parse(name)
        x = torch.randint(-100, 101, (3, 50), dtype=torch.int8)
        arguments = (x, torch.ones(1, 1), random_weight(7, 50, fmt), torch.rand(7), None, fmt.exponent_bits, fmt.mantissa_bits)
        assert torch.equal(ops.int_linear(*arguments), ops.int_linear_reference(*arguments))
    wide = parse("e4m3")
    arguments = (torch.randn(2, 9), random_weight(7, 9, wide), torch.rand(7), None, 4, 3)
    assert torch.equal(ops.float_linear(*arguments), ops.float_linear_reference(*arguments))


def test_the_ops_keep_torchs_rules(kernel: str) -> None:
    torch.manual_seed(5)
    x, shift = torch.randn(3, 20), torch.randint(0, 4, (20,), dtype=torch.uint8)
    quantize = (x, torch.tensor(0.3), shift, torch.rand(20) + 0.5, 2, 1, True, 3, True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ops.quantize_input, quantize, test_utils=checks)
    found, step = ops.quantize_input(*quantize)
    weight, scale, bias = random_weight(6, 20, parse("e2m1")), torch.rand(6), torch.randn(6)
    torch.library.opcheck(ops.int_linear, (found, step, weight, scale, bias, 2, 1), test_utils=checks)
    torch.library.opcheck(ops.float_linear, (x, weight, scale, bias, 2, 1), test_utils=checks)


def test_kernels_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in available():
        monkeypatch.setenv("LLM_FP4_KERNEL", name)
        assert select() == name
        assert (selected() is None) == (name == "torch")
    monkeypatch.setenv("LLM_FP4_KERNEL", "mmx")
    with pytest.raises(UnsupportedError, match="mmx"):
        select()
    monkeypatch.delenv("LLM_FP4_KERNEL")
    assert select() == available()[0]
