"""The compiled kernels of block formats against the reference bodies: as near to float64 as those, equal among each other."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

from llm_fp4.kernels import block_linear, quantize_blocks, quantized_block_linear
from llm_fp4.kernels.blocks import block_linear_reference
from llm_fp4.kernels.compiled import available, select
from llm_fp4.numerics import FloatFormat, PerBlock, QuantizedTensor, block_step, decode, pack, parse, scale_bytes, unpack

KERNELS = available()[:-1]
BLOCKS = (PerBlock(16, "e4m3"), PerBlock(32, "e8m0"))
SHAPES = ((1, 1, 1), (0, 40, 5), (3, 0, 4), (2, 40, 0), (1, 4097, 33), (5, 2050, 70), (9, 128, 64), (40, 577, 9), (14, 2090, 70))

pytestmark = pytest.mark.skipif(not KERNELS, reason="this installation has no compiled CPU kernels; build it with a C++ compiler")


@pytest.fixture(params=KERNELS or ["torch"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    threads = torch.get_num_threads()
    yield select(request.param)
    torch.set_num_threads(threads)
    select()


def random_weight(out: int, width: int, fmt: FloatFormat, blocks: PerBlock) -> QuantizedTensor:
    codes = pack(torch.randint(0, 2**fmt.bits, (out, width), dtype=torch.uint8), fmt.bits)
    low, high = (1, 127) if blocks.two_level else (115, 135)
    if blocks.scale_dtype == "float16":  # subnormals among them
        scales = (torch.rand(blocks.shape(out, width)) * torch.logspace(-7, 0, max(out, 1))[:out, None]).half()
    else:
        scales = torch.randint(low, high, blocks.shape(out, width), dtype=torch.uint8).view(blocks.torch_dtype)
    return QuantizedTensor(codes, scales, fmt, blocks, (out, width), torch.tensor(2.0**-7) if blocks.two_level else None)


def weight_arguments(w: QuantizedTensor, bias: Tensor | None) -> tuple[object, ...]:
    blocks = w.granularity
    assert isinstance(blocks, PerBlock)
    return (
        w.packed, scale_bytes(w.scale), w.second_scale, bias, blocks.block_size, blocks.scale_dtype, w.format.exponent_bits,
        w.format.mantissa_bits,
    )  # fmt: skip


def input_arguments(blocks: PerBlock, fmt: FloatFormat) -> tuple[object, ...]:
    second = torch.tensor(2.0**-6 if blocks.two_level else 1.0)
    return (second, blocks.block_size, blocks.scale_dtype, fmt.exponent_bits, fmt.mantissa_bits)


def doubled(w: QuantizedTensor) -> Tensor:
    blocks = w.granularity
    assert isinstance(blocks, PerBlock)
    step = block_step(w.scale, w.second_scale, w.format).double().repeat_interleave(blocks.block_size, -1)[:, : w.shape[1]]
    return decode(unpack(w.packed, w.format.bits, w.shape[1]), w.format).double() * step


def check_error(got: Tensor, reference: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Hold the error against float64 to at most twice the plain float32 product's, with room for one rounding of the largest sum."""
    exact = values.double() @ weight.t() + (0 if bias is None else bias.double())
    if not exact.numel():
        return
    largest = float(exact.abs().max()) + float((values.double().abs() @ weight.t().abs()).max()) / 16
    plain = float((reference.double() - exact).abs().max())
    assert float((got.double() - exact).abs().max()) <= 2 * plain + 2.0**-23 * largest


@pytest.mark.parametrize("blocks", BLOCKS, ids=lambda b: b.name)
@pytest.mark.parametrize("name", ["e2m1", "e1m2", "e3m0"])
def test_quantized_products_are_as_good_as_plain_ones(kernel: str, name: str, blocks: PerBlock) -> None:
    fmt, choose = parse(name), random.Random(f"{name} {blocks.name}")
    torch.manual_seed(3)
    for tokens, width, out in SHAPES:
        torch.set_num_threads(choose.choice((1, 2, 3)))
        x = torch.randn(tokens, width) * torch.logspace(-3, 2, max(width, 1))[:width]
        x = x.bfloat16() if choose.random() < 0.3 else x
        w, bias = random_weight(out, width, fmt, blocks), torch.randn(out) if choose.random() < 0.5 else None
        source = input_arguments(blocks, fmt)
        got = quantized_block_linear(x, *source, *weight_arguments(w, bias))
        values = quantize_blocks(x, *source)
        check_error(got, block_linear_reference(values, *weight_arguments(w, bias)), values, doubled(w), bias)


HALVES = (PerBlock(32, "float16"), PerBlock(8, "float16"), PerBlock(128, "float16"))


@pytest.mark.parametrize("blocks", [*BLOCKS, *HALVES], ids=lambda b: b.name)
def test_float_inputs(kernel: str, blocks: PerBlock) -> None:
    torch.manual_seed(4)
    for (tokens, width, out), dtype in product(SHAPES, (torch.float32, torch.bfloat16)):
        x, bias = torch.randn(tokens, width).to(dtype), torch.randn(out)
        w = random_weight(out, width, parse("e2m1"), blocks)
        got = block_linear(x, *weight_arguments(w, bias))
        check_error(got, block_linear_reference(x, *weight_arguments(w, bias)), x, doubled(w), bias)


def test_all_kernels_and_numbers_of_threads_give_the_same_bits() -> None:
    """Many rows run through expanded panels where a set has them, whose sums have an order of their own."""
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    for blocks, (tokens, width, out) in product(BLOCKS, SHAPES):
        x, w = torch.randn(tokens, width), random_weight(out, width, parse("e2m1"), blocks)
        results: dict[bool, list[Tensor]] = {False: [], True: []}
        for name, count in product(KERNELS, (1, 3)):
            select(name)
            torch.set_num_threads(count)
            got = quantized_block_linear(x, *input_arguments(blocks, parse("e2m1")), *weight_arguments(w, None))
            results[tokens > 12 and name in ("avx512", "amx")].append(got)
        for alike in results.values():
            assert all(torch.equal(alike[0], other) for other in alike[1:])
    torch.set_num_threads(threads)
    select()


@pytest.mark.parametrize("blocks", BLOCKS, ids=lambda b: b.name)
def test_a_million_inputs_around_rounding_boundaries(kernel: str, blocks: PerBlock) -> None:
    """One column of weight 1 a row shows every value of the input: scales and levels must be the reference's."""
    fmt, generator = parse("e2m1"), torch.Generator().manual_seed(6)
    width = 256
    boundary = torch.tensor([0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 464 / 16])
    pick = boundary[torch.randint(0, len(boundary), (4096, width), generator=generator)]
    scale = torch.exp2(torch.randint(-9, 6, (4096, width // 16), generator=generator).float())
    scale *= 1 + torch.randint(0, 16, scale.shape, generator=generator) / 16  # values and ties of E4M3
    x = pick * scale.repeat_interleave(16, -1) * (torch.randint(0, 2, pick.shape, generator=generator) * 2 - 1)
    x = (x.view(torch.int32) + torch.randint(-2, 3, x.shape, generator=generator).int()).view(torch.float32)
    codes = pack(torch.eye(width, dtype=torch.uint8) * 2, 4)  # level 2 of E2M1: the value 1
    ones = torch.full(blocks.shape(width, width), 0x38 if blocks.two_level else 127, dtype=torch.uint8).view(blocks.torch_dtype)
    w = QuantizedTensor(codes, ones, fmt, blocks, (width, width), torch.tensor(1.0) if blocks.two_level else None)
    source = input_arguments(blocks, fmt)
    got = quantized_block_linear(x, *source, *weight_arguments(w, None))
    assert torch.equal(got, quantize_blocks(x, *source))


def test_nan_reaches_every_output_of_its_row_and_infinity_saturates(kernel: str) -> None:
    for blocks in BLOCKS:
        x = torch.randn(3, 64)
        x[0, 40], x[1, 3] = float("nan"), float("inf")
        w = random_weight(20, 64, parse("e2m1"), blocks)
        source = input_arguments(blocks, parse("e2m1"))
        got = quantized_block_linear(x, *source, *weight_arguments(w, None))
        want = block_linear_reference(quantize_blocks(x, *source), *weight_arguments(w, None))
        assert bool(got[0].isnan().all())
        assert torch.allclose(got[1:], want[1:], rtol=1e-5, atol=1e-5)


def test_the_op_keeps_torchs_rules(kernel: str) -> None:
    w = random_weight(6, 40, parse("e2m1"), BLOCKS[0])
    arguments = (torch.randn(5, 40), *input_arguments(BLOCKS[0], parse("e2m1")), *weight_arguments(w, torch.randn(6)))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(quantized_block_linear, arguments, test_utils=checks)
