"""The Triton kernels under Triton's interpreter, on CPU tensors, against the reference bodies: equal bit for bit.

That they compile to machine code of NVIDIA GPUs, which takes none, is a test of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_fp4.kernels import ops
from llm_fp4.numerics import FloatFormat, decode, levels, pack, parse, unpack
from llm_fp4.plan import TWO_LIMBS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FORMATS = ("e1m2", "e2m1", "e3m0", "e1m6")

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter's numpy
outside = pytest.mark.skipif(INTERPRETED, reason="is that process")
inside = pytest.mark.skipif(not INTERPRETED, reason="run by the first test, in a process with TRITON_INTERPRET=1")


@needs_triton
@outside
def test_all_of_these_pass_under_the_interpreter() -> None:
    """The interpreter is chosen when triton is imported, so it takes a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def random_codes(out: int, width: int, fmt: FloatFormat) -> torch.Tensor:
    return pack(torch.randint(0, 2**fmt.bits, (out, width), dtype=torch.uint8), fmt.bits)


@needs_triton
@inside
@pytest.mark.parametrize("name", [*FORMATS, "ue2m2", "e2m3"])
def test_quantize_input(name: str) -> None:
    from llm_fp4.kernels import triton

    fmt = parse(name)
    torch.manual_seed(0)
    most = max(k for k in range(8) if fmt.max_level << k <= TWO_LIMBS)
    grid = levels(fmt).float().unique()
    ties = torch.cat((grid, (grid[1:] + grid[:-1]) / 2, torch.tensor([torch.inf, -torch.inf, 1e-45, 3e38])))
    for max_shift, (tokens, width), per_token in product((0, most), ((1, 1), (3, 33), (2, 1500), (0, 5)), (False, True)):
        x = torch.randn(tokens, width) * torch.logspace(-2, 2, width)
        pick = torch.rand(x.shape) < 0.3
        x[pick] = ties[torch.randint(0, len(ties) - 4 * per_token, (int(pick.sum()),))]
        if tokens == 3:
            x[1, 4] = torch.nan
        shift = torch.randint(0, max_shift + 1, (width,), dtype=torch.uint8) if max_shift else None
        smooth = torch.rand(width) + 0.3 if max_shift and per_token else None
        scale = torch.tensor(1.0 if max_shift else 0.37)
        for source in (x, x.bfloat16()):
            got, step = triton.quantize_input(source, scale, shift, smooth, fmt, max_shift, per_token)
            want, want_step = ops.quantize_input_reference(
                source, scale, shift, smooth, fmt.exponent_bits, fmt.mantissa_bits, fmt.signed, max_shift, per_token
            )
            assert got.dtype == want.dtype
            assert torch.equal(got, want)
            torch.testing.assert_close(step, want_step, rtol=0, atol=0, equal_nan=True)


@needs_triton
@inside
@pytest.mark.parametrize(("width", "per_token"), product((1, 40, 96, 1536, 2048, 8192, 16384), (False, True)))
def test_quantize_input_under_a_transform(width: int, per_token: bool) -> None:
    from llm_fp4.kernels import triton

    torch.manual_seed(3)
    fmt, most = parse("e2m1"), 3
    x = torch.randn(3, width) * torch.logspace(-1, 1, width)
    x[1, width // 2] = torch.nan
    for max_shift in (0, most):
        shift = torch.randint(0, max_shift + 1, (width,), dtype=torch.uint8) if max_shift else None
        smooth = torch.rand(width) + 0.3 if max_shift else None
        scale = torch.tensor(1.0 if per_token else 0.37)
        for source in (x, x.bfloat16()):
            got = triton.quantize_input(source, scale, shift, smooth, fmt, max_shift, per_token, True)
            want = ops.quantize_input_reference(source, scale, shift, smooth, 2, 1, True, max_shift, per_token, True)
            assert torch.equal(got[0], want[0])
            torch.testing.assert_close(got[1], want[1], rtol=0, atol=0, equal_nan=True)
            assert width == 1 or got[0].any()


@needs_triton
@inside
@pytest.mark.parametrize("name", FORMATS)
def test_int_linear(name: str) -> None:
    from llm_fp4.kernels import triton

    fmt = parse(name)
    torch.manual_seed(1)
    for (tokens, width, out), top in product(
        ((1, 1, 1), (3, 300, 37), (20, 65, 130), (130, 40, 5), (0, 4, 2), (2, 0, 3)), (96, TWO_LIMBS)
    ):
        x = torch.randint(-top, top + 1, (tokens, width)).to(torch.int8 if top <= 127 else torch.int16)
        codes, scale = random_codes(out, width, fmt), torch.rand(out) + 0.01
        for step, bias in ((torch.rand(tokens, 1), torch.randn(out)), (torch.rand(1, 1), None)):
            want = ops.int_linear_reference(x, step, codes, scale, bias, fmt.exponent_bits, fmt.mantissa_bits)
            assert torch.equal(triton.int_linear(x, step, codes, scale, bias, fmt), want), (tokens, width, out, top)


@needs_triton
@inside
@pytest.mark.parametrize("name", FORMATS[:3])
def test_float_linear(name: str) -> None:
    from llm_fp4.kernels import triton

    fmt = parse(name)
    torch.manual_seed(2)
    for tokens, width, out in ((1, 1, 1), (3, 301, 37), (20, 65, 130), (0, 4, 2)):
        x, codes, scale, bias = torch.randn(tokens, width), random_codes(out, width, fmt), torch.rand(out), torch.randn(out)
        weight = decode(unpack(codes, 4, width), fmt).double()
        exact = x.double() @ weight.t() * scale + bias
        bound = (width + 6) * 2.0**-24 * ((x.abs().double() @ weight.abs().t()) * scale + bias.abs())
        assert bool(((triton.float_linear(x, codes, scale, bias, fmt) - exact).abs() <= bound).all())


FLOATS = dict.fromkeys(("low", "top", "unit", "root"), "fp32") | dict.fromkeys(
    ("scale", "smooth", "step_out", "step", "bias", "y"), "*fp32"
)
TYPES = {**FLOATS, "shift": "*u8", "codes": "*u8"}  # what is left out is an int32
ROUNDING = {"M": 1, "MAX_SHIFT": 3, "HAS_SHIFT": True, "HAS_SMOOTH": True}
PRODUCT = {"E": 2, "M": 1, "HAS_BIAS": True, "ROWS": 16, "OUTS": 16}
CAPABILITIES = (80, 90)


@needs_triton
@outside
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("kernel", "types", "constants", "warps"),
    [
        ("_quantize_kernel", {"x": "*bf16", "levels": "*i8"}, {**ROUNDING, "PER_TOKEN": False, "RUN": 0, "BLOCK": 1024}, 4),
        ("_quantize_kernel", {"x": "*fp32", "levels": "*i16"}, {**ROUNDING, "PER_TOKEN": True, "RUN": 9, "BLOCK": 1024}, 4),
        ("_quantize_kernel", {"x": "*bf16", "levels": "*i8"}, {**ROUNDING, "PER_TOKEN": True, "RUN": 13, "BLOCK": 8192}, 8),
        ("_int_linear_kernel", {"levels": "*i8"}, {**PRODUCT, "WIDE": False, "BYTES": 128}, 4),
        ("_int_linear_kernel", {"levels": "*i16"}, {**PRODUCT, "WIDE": True, "BYTES": 128}, 4),
        ("_float_linear_kernel", {"x": "*fp32"}, {**PRODUCT, "BYTES": 32}, 4),
    ],
)
def test_kernels_compile(
    kernel: str, types: dict[str, str], constants: dict[str, Any], warps: int, capability: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from llm_fp4.kernels import triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(kernels, kernel)
    signature = {n: "constexpr" if n in constants else {**TYPES, **types}.get(n, "i32") for n in function.arg_names}
    source = ASTSource(function, signature, {(function.arg_names.index(n),): v for n, v in constants.items()})
    options = {"num_warps": warps, "enable_fp_fusion": False}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert len(made.asm["cubin"]) > 1000
    assert made.metadata.shared <= 48 * 1024  # what every GPU has without asking
