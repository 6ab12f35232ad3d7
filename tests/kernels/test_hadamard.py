"""The fast Hadamard transform against the matrix it stands for."""

import pytest
import torch

from llm_fp4.kernels import hadamard
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


@pytest.mark.parametrize("width", [16, 12, 7])
def test_opcheck(width: int) -> None:
    torch.library.opcheck(torch.ops.llm_fp4.hadamard.default, (torch.randn(4, width),))
