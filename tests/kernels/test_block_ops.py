"""The operations of block formats against a plain loop over blocks, and as torch.library ops."""

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from llm_fp4.kernels import block_linear, quantize_blocks
from llm_fp4.numerics import PerBlock, QuantizedTensor, max_scale, parse, quantize_tensor, scale_bytes, second_scale

E2M1 = parse("e2m1")


def by_hand(x: Tensor, second: float, size: int, kind: str) -> np.ndarray:
    """Quantize block by block with the types of ml_dtypes."""
    out = np.zeros(x.shape, dtype=np.float32)
    for t, row in enumerate(x.numpy()):
        for start in range(0, len(row), size):
            block = row[start : start + size]
            top = np.abs(block).max()
            if kind == "e4m3":
                scale = (
                    np.float32(np.minimum(np.float32(top / second) / np.float32(6), 448).astype(ml_dtypes.float8_e4m3fn)) * second
                )
            else:
                scale = np.float32(2.0 ** (np.floor(np.log2(top * 8 / 7 if np.frexp(top)[0] >= 0.875 else top)) - 2)) if top else 1
            if scale:
                value = np.clip(block * np.float32(1 / np.float32(scale * 0.5)) / 2, -6, 6)
                out[t, start : start + size] = value.astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * scale
    return out


@pytest.mark.parametrize("width", [64, 40, 7])
@pytest.mark.parametrize(("size", "kind"), [(16, "e4m3"), (32, "e8m0")])
def test_blocks_of_an_input(width: int, size: int, kind: str) -> None:
    x = torch.randn(9, width, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 9)[:, None]
    x[4] = 0
    second = 2.0**-5 if kind == "e4m3" else 1.0
    ours = quantize_blocks(x, torch.tensor(second), size, kind, 2, 1)
    np.testing.assert_array_equal(ours.numpy(), by_hand(x, second, size, kind))


def test_a_block_far_below_the_range_of_the_scales_becomes_zero() -> None:
    x = torch.full((1, 32), 1e-6)
    x[0, 0] = 6.0
    values = quantize_blocks(x, torch.tensor(1.0), 16, "e4m3", 2, 1)
    assert values[0, 0] == 6
    assert not values[0, 16:].any()


def weight(blocks: PerBlock, columns: int) -> QuantizedTensor:
    w = torch.randn(11, columns, generator=torch.Generator().manual_seed(1)) / 8
    second = second_scale(w.abs().amax(), E2M1) if blocks.two_level else None
    return quantize_tensor(w, max_scale(blocks.absmax(w), second, E2M1, blocks), E2M1, blocks, second_scale=second)


BLOCKS = [PerBlock(16, "e4m3"), PerBlock(32, "e8m0"), PerBlock(8, "float16")]


@pytest.mark.parametrize("blocks", BLOCKS, ids=lambda b: b.name)
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_product(blocks: PerBlock, tokens: int) -> None:
    w, x, bias = weight(blocks, 40), torch.randn(tokens, 40), torch.randn(11)
    out = block_linear(x, w.packed, scale_bytes(w.scale), w.second_scale, bias, blocks.block_size, blocks.scale_dtype, 2, 1)
    expected = x.double() @ w.dequantize().double().t() + bias.double()
    assert torch.allclose(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("blocks", BLOCKS, ids=lambda b: b.name)
def test_opcheck(blocks: PerBlock) -> None:
    w, x = weight(blocks, 40), torch.randn(5, 40)
    torch.library.opcheck(
        torch.ops.llm_fp4.quantize_blocks.default, (x, torch.tensor(0.5), blocks.block_size, blocks.scale_dtype, 2, 1)
    )
    for bias in (None, torch.randn(11)):
        args = (x, w.packed, scale_bytes(w.scale), w.second_scale, bias, blocks.block_size, blocks.scale_dtype, 2, 1)
        torch.library.opcheck(torch.ops.llm_fp4.block_linear.default, args)
