"""The Triton kernels compile to machine code of NVIDIA GPUs, which takes none: what they compute is tested by the interpreter."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]

FLOATS = dict.fromkeys(("low", "top", "unit", "root"), "fp32") | dict.fromkeys(
    ("scale", "smooth", "step_out", "step", "bias", "y"), "*fp32"
)
TYPES = {**FLOATS, "shift": "*u8", "codes": "*u8"}  # what is left out is an int32
ROUNDING = {"M": 1, "MAX_SHIFT": 3, "HAS_SHIFT": True, "HAS_SMOOTH": True}
PRODUCT = {"E": 2, "M": 1, "HAS_BIAS": True, "ROWS": 16, "OUTS": 16}
CAPABILITIES = (80, 90)


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
