"""The norm fused with rounding: the reference against torch's norms, and the kernel against the reference, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from llm_fp4.kernels import norm
from llm_fp4.kernels.compiled import available, select
from llm_fp4.numerics import parse


@pytest.fixture(params=available())
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    threads = torch.get_num_threads()
    yield select(request.param)
    torch.set_num_threads(threads)
    select()


@pytest.mark.parametrize("centered", [False, True])
def test_the_reference_is_torchs_norm(centered: bool) -> None:
    torch.manual_seed(0)
    for width in (1, 3, 16, 37, 576):
        x, weight, bias = torch.randn(4, width) * 3 + 1, torch.rand(width) + 0.5, torch.randn(width)
        if centered:
            expected = layer_norm(x.double(), (width,), weight.double(), bias.double(), 1e-3)
        else:
            expected = rms_norm(x.double(), (width,), weight.double(), 1e-3) + bias.double()
        got = norm.normalize(x, weight, bias, 1e-3, centered)
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("centered", [False, True])
def test_levels_equal_the_reference(kernel: str, centered: bool, per_token: bool) -> None:
    torch.manual_seed(1)
    for name, limit in (("e2m1", 3), ("e3m0", 7), ("e1m6", 0), ("e1m2", 2)):
        fmt = parse(name)
        for tokens, width in ((1, 1), (3, 40), (0, 5), (200, 577)):
            torch.set_num_threads(2)
            shift = torch.randint(0, limit + 1, (width,), dtype=torch.uint8) if limit else None
            smooth: Tensor | None = torch.rand(width) + 0.5 if limit == 2 else None
            x = torch.randn(tokens, width) * 5
            if tokens == 3:
                x[1, 2] = torch.nan
            for source in (x, x.bfloat16()):
                arguments = (
                    source, torch.rand(width) + 0.5, torch.randn(width) if centered else None, 1e-5, centered, torch.tensor(0.3), shift,
                    smooth, fmt.exponent_bits, fmt.mantissa_bits, True, limit, per_token,
                )  # fmt: skip
                got, step = norm.norm_quantize_input(*arguments)
                want, want_step = norm.norm_quantize_input_reference(*arguments)
                assert torch.equal(got, want)
                torch.testing.assert_close(step, want_step, rtol=0, atol=0, equal_nan=True)


def test_opcheck() -> None:
    x, weight = torch.randn(6, 16), torch.rand(16)
    shift = torch.arange(16, dtype=torch.uint8) % 4
    torch.library.opcheck(
        norm.norm_quantize_input, (x, weight, weight + 1, 1e-5, True, torch.tensor(0.5), shift, None, 2, 1, True, 3, True)
    )
