"""The fast Hadamard transform against the matrix it stands for."""

import pytest
import torch

from llm_fp4.kernels import hadamard
from llm_fp4.kernels.hadamard import power_of_two


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


@pytest.mark.parametrize("width", [16, 12, 7])
def test_opcheck(width: int) -> None:
    torch.library.opcheck(torch.ops.llm_fp4.hadamard.default, (torch.randn(4, width),))
