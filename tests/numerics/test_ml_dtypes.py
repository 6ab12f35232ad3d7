"""The formats that hardware and ml_dtypes know. Ours have no NaN or infinity, so they are compared where theirs are finite."""

import ml_dtypes
import numpy as np
import pytest
import torch

from llm_fp4.numerics import decode, encode, fake_quantize, parse

# name, their type, their exponent bias: a step of ours is 2^(1 - m - bias) of theirs
KNOWN = [
    ("e2m1", ml_dtypes.float4_e2m1fn, 1),  # 2^-1 = 0.5
    ("e3m2", ml_dtypes.float6_e3m2fn, 3),  # 2^-4
    ("e2m3", ml_dtypes.float6_e2m3fn, 1),  # 2^-3
    ("e4m3", ml_dtypes.float8_e4m3fn, 7),  # 2^-9
    ("e5m2", ml_dtypes.float8_e5m2, 15),  # 2^-16
]


@pytest.mark.parametrize(("name", "theirs", "bias"), KNOWN)
def test_every_code(name: str, theirs: type, bias: int) -> None:
    fmt = parse(name)
    codes = np.arange(2**fmt.bits, dtype=np.uint8)
    expected = codes.view(theirs).astype(np.float64)
    finite = np.isfinite(expected)
    assert finite.sum() >= codes.size - 8  # E4M3 gives two codes to NaN, E5M2 eight to NaN and infinity
    ours = decode(torch.from_numpy(codes), fmt).double() * fmt.scale_of_bias(float(bias))
    np.testing.assert_array_equal(ours.numpy()[finite], expected[finite])


@pytest.mark.parametrize(("name", "theirs", "bias"), KNOWN)
def test_rounding(name: str, theirs: type, bias: int) -> None:
    """The same value and code from every bfloat16 within their range, ties included."""
    fmt = parse(name)
    x = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    x = x[np.isfinite(x) & (np.abs(x) <= float(ml_dtypes.finfo(theirs).max))]
    x = np.concatenate((x, np.float32(float(ml_dtypes.finfo(theirs).max)) * np.linspace(-1, 1, 20001, dtype=np.float32)))
    scale = fmt.scale_of_bias(float(bias)).float()
    rounded = x.astype(theirs)
    value = rounded.astype(np.float32)
    np.testing.assert_array_equal(fake_quantize(torch.from_numpy(x), scale, fmt).numpy(), value)
    codes = encode(torch.from_numpy(x) * (1 / scale), fmt).numpy()
    mask = np.uint8(2**fmt.bits - 1)
    their_codes = np.where(value == 0, 0, rounded.view(np.uint8) & mask)  # ours has one zero
    np.testing.assert_array_equal(codes, their_codes)
