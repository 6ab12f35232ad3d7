"""What holds of rounding and packing for any input."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from paper import ALL_FORMATS
from torch import Tensor

from llm_fp4.numerics import FloatFormat, decode, encode, fake_quantize, levels, pack, packed_width, round_to_level, unpack

formats = st.sampled_from(ALL_FORMATS)
signed_formats = st.sampled_from([f for f in ALL_FORMATS if f.signed])
scales = st.floats(2.0**-20, 2.0**20, width=32)


def vectors(limit: float = 2.0**70) -> st.SearchStrategy[Tensor]:
    """Float32 vectors over the whole range of every format, with exact small numbers (ties) among them."""
    element = st.one_of(
        st.floats(-limit, limit, width=32),
        st.floats(-300, 300, width=32),
        st.integers(-600, 600).map(lambda i: i / 4),
    )
    return arrays(np.float32, st.integers(1, 40), elements=element).map(torch.from_numpy)


@given(vectors(), formats)
def test_nearest(x: Tensor, fmt: FloatFormat) -> None:
    exact = x.double()
    grid = levels(fmt).double()
    best = (exact[:, None] - grid).abs().amin(1)
    assert torch.equal((exact - round_to_level(x, fmt).double()).abs(), best)


@given(vectors(), scales, formats)
def test_idempotent(x: Tensor, scale: float, fmt: FloatFormat) -> None:
    """Also under a scale, although its reciprocal is rounded."""
    once = round_to_level(x, fmt)
    assert torch.equal(round_to_level(once, fmt), once)
    s = torch.tensor(scale)
    value = fake_quantize(x, s, fmt)
    assert torch.equal(fake_quantize(value, s, fmt), value)


@given(vectors(), scales, formats)
def test_monotone(x: Tensor, scale: float, fmt: FloatFormat) -> None:
    ordered = x.sort().values
    assert bool((fake_quantize(ordered, torch.tensor(scale), fmt).diff() >= 0).all())


@given(vectors(), scales, signed_formats)
def test_sign_symmetric(x: Tensor, scale: float, fmt: FloatFormat) -> None:
    s = torch.tensor(scale)
    assert torch.equal(fake_quantize(-x, s, fmt), -fake_quantize(x, s, fmt))
    level = round_to_level(x, fmt)
    sign_bit = 2 ** (fmt.bits - 1)
    flipped = torch.where(level == 0, torch.zeros_like(level), (encode(x, fmt) ^ sign_bit).float())
    assert torch.equal(encode(-x, fmt).float(), flipped)


@given(st.floats(1.0, 2.0**60, width=32), formats)
def test_saturating(factor: float, fmt: FloatFormat) -> None:
    x = torch.tensor([float(fmt.max_level) * factor])
    assert round_to_level(x, fmt).tolist() == [fmt.max_level]
    assert round_to_level(-x, fmt).tolist() == [-fmt.max_level if fmt.signed else 0]
    assert decode(encode(x, fmt), fmt).tolist() == [fmt.max_level]


@given(vectors(limit=2.0**30), scales, st.integers(-30, 30), formats)
def test_power_of_two_equivariant(x: Tensor, scale: float, power: int, fmt: FloatFormat) -> None:
    s, factor = torch.tensor(scale), 2.0**power
    # a subnormal product would lose bits of its own
    x = torch.where(x.abs() < 2.0**-60, torch.zeros_like(x), x)
    assert torch.equal(fake_quantize(x * factor, s * factor, fmt), fake_quantize(x, s, fmt) * factor)


@given(vectors(), formats)
def test_encode_agrees_with_rounding(x: Tensor, fmt: FloatFormat) -> None:
    codes = encode(x, fmt)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 2**fmt.bits
    assert torch.equal(decode(codes, fmt), round_to_level(x, fmt))


@given(st.data(), st.integers(3, 8), st.integers(0, 41), st.sampled_from([(), (0,), (1,), (3,), (2, 3)]))
def test_unpack_inverts_pack(data: st.DataObject, bits: int, columns: int, leading: tuple[int, ...]) -> None:
    codes = torch.from_numpy(data.draw(arrays(np.uint8, (*leading, columns), elements=st.integers(0, 2**bits - 1))))
    before = codes.clone()
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*leading, packed_width(columns, bits))
    assert torch.equal(unpack(packed, bits, columns), codes)
    assert torch.equal(codes, before)


@given(st.data(), st.integers(3, 8), st.integers(0, 41))
def test_a_packed_row_is_a_little_endian_bit_stream(data: st.DataObject, bits: int, columns: int) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=columns, max_size=columns))
    stream = sum(code << (bits * i) for i, code in enumerate(codes))
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert bytes(packed.tolist()) == stream.to_bytes(packed_width(columns, bits), "little")
