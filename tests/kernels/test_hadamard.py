"""The fast Hadamard transform against the matrix it stands for."""

from itertools import product

import pytest
import torch

from llm_fp4.kernels import hadamard, int_linear, quantize_input, quantized_block_linear, quantized_linear
from llm_fp4.kernels.compiled import available, select
from llm_fp4.kernels.hadamard import hadamard_reference, power_of_two


@pytest.mark.parametrize("width", [1, 2, 8, 64, 12, 96, 7, 0])
def test_is_the_block_diagonal_sylvester_matrix(width: int) -> None:
    size = power_of_two(width) if width else 1
    index = range(size)
    parity = torch.tensor([[(i & j).bit_count() % 2 for j in index] for i in index]).double()
    matrix = torch.block_diag(*[(1 - 2 * parity) / size**0.5] * (width // size)) if width else torch.zeros(0, 0).double()
    x = torch.randn(5, width)
    assert torch.allclose(hadamard(x).double(), x.double() @ matrix, atol=1e-5)
    assert torch.allclose(hadamard(hadamard(x)), x, atol=1e-5)


def test_leading_shapes_and_dtypes() -> None:
    x = torch.randn(2, 3, 48, dtype=torch.bfloat16)
    assert hadamard(x).shape == x.shape
    assert hadamard(x).dtype == torch.float32
    assert hadamard(torch.randn(48, 3).t()).shape == (3, 48)


@pytest.mark.parametrize("kernel", available())
def test_every_kernel_equals_the_reference(kernel: str) -> None:
    try:
        select(kernel)
        for width in (1, 2, 7, 32, 96, 576, 1536, 2048, 4096):
            for x in (torch.randn(3, width) * 100, torch.randn(width, 5).t(), torch.randn(2, 2, width).bfloat16()):
                assert torch.equal(hadamard(x), hadamard_reference(x)), width
    finally:
        select()


@pytest.mark.parametrize("kernel", available())
def test_rounding_in_the_same_pass_equals_rounding_after_it(kernel: str) -> None:
    torch.manual_seed(1)
    try:
        select(kernel)
        for (tokens, width), per_token, limit in product(((1, 576), (40, 96), (70, 1536), (0, 8), (3, 7)), (False, True), (0, 3)):
            packed, scale = torch.randint(0, 256, (5, -(-width // 2)), dtype=torch.uint8), torch.rand(5)
            if width % 2:
                packed[:, -1] &= 15
            shift = torch.randint(0, limit + 1, (width,), dtype=torch.uint8) if limit else None
            rule = (torch.tensor(0.5), shift, None, 2, 1, True, limit, per_token)
            blocks = (
                torch.ones(()),
                32,
                "e8m0",
                2,
                1,
                packed,
                torch.full((5, -(-width // 32)), 127, dtype=torch.uint8),
                None,
                None,
            )
            for x in (torch.randn(tokens, width) * 3, torch.randn(tokens, width).bfloat16(), torch.randn(width, tokens).t()):
                levels, step = quantize_input(hadamard_reference(x), *rule)
                got = quantize_input(x, *rule, True)
                assert torch.equal(got[0], levels)
                assert torch.equal(got[1], step)
                whole = quantized_linear(x, *rule, packed, scale, None, 2, 1, True)
                assert torch.equal(whole, int_linear(levels, step, packed, scale, None, 2, 1))
                plain = quantized_linear(x, *rule, packed, scale, None, 2, 1)
                assert tokens == 0 or torch.equal(whole, plain) == (width == 7)  # an odd width has nothing to mix
                whole = quantized_block_linear(x, *blocks, 32, "e8m0", 2, 1, True)
                assert torch.equal(whole, quantized_block_linear(hadamard_reference(x), *blocks, 32, "e8m0", 2, 1))
        for op, arguments in (
            (quantize_input, (x, *rule, True)),
            (quantized_linear, (x, *rule, packed, scale, None, 2, 1, True)),
            (quantized_block_linear, (x, *blocks, 32, "e8m0", 2, 1, True)),
        ):
            torch.library.opcheck(op, arguments)
    finally:
        select()


@pytest.mark.parametrize("width", [16, 12, 7])
def test_opcheck(width: int) -> None:
    torch.library.opcheck(torch.ops.llm_fp4.hadamard.default, (torch.randn(4, width),))
