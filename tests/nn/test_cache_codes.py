"""Keys and values as codes against rounding written out, and what a change of dtype does to them."""

from __future__ import annotations

import pytest
import torch

from llm_fp4.errors import CheckpointError, NonFiniteError
from llm_fp4.nn import CacheCodes
from llm_fp4.numerics import fake_quantize, packed_width, parse
from llm_fp4.plan import CachePlan, CacheSpec


def made(key: str, value: str, size: int = 10) -> tuple[CacheCodes, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 3, 7, size, generator=generator) for _ in range(2))
    spec = CacheSpec(parse(key), parse(value), 3, size, size, 8, 4)
    scale = 0.1 + torch.rand(3, 1, size, generator=generator)
    return CacheCodes.from_plan(CachePlan(spec, scale, torch.full((3, 1, 1), 0.9), (0.0, 0.0), 0.0)), keys, values


@pytest.mark.parametrize(("key", "value"), [("e2m1", "e1m2"), ("e3m0", "e2m1"), ("e2m3", "e1m4"), ("e4m3", "e1m6")])
def test_codes_are_the_rounded_values(key: str, value: str) -> None:
    codes, keys, values = made(key, value)
    packed = codes.encode_keys(keys)
    assert packed.shape == (2, 3, 7, packed_width(10, parse(key).bits))
    assert torch.equal(codes.decode_keys(packed, torch.float32), fake_quantize(keys, codes.key_scale, parse(key)))
    stored, step = codes.encode_values(values)
    assert step.dtype == torch.bfloat16
    exact = values.abs().amax(-1, keepdim=True) * 0.9 / parse(value).max_level
    assert torch.allclose(step.float(), exact, rtol=2**-8)
    expected = fake_quantize(values, step.float(), parse(value))
    assert torch.allclose(codes.decode_values(stored, step, torch.float32), expected, rtol=1e-6)


def test_a_token_of_zeros_and_no_tokens() -> None:
    codes, keys, values = made("e2m1", "e2m1")
    stored, step = codes.encode_values(torch.zeros_like(values))
    assert not codes.decode_values(stored, step, torch.float32).any()
    assert codes.decode_keys(codes.encode_keys(keys[:, :, :0]), torch.float32).shape == (2, 3, 0, 10)


def test_scales_stay_float32_and_values_come_in_the_models_dtype() -> None:
    codes, keys, _ = made("e2m1", "e2m1")
    codes = codes.bfloat16()
    assert codes.key_scale.dtype == codes.value_ratio.dtype == torch.float32
    assert codes.decode_keys(codes.encode_keys(keys.bfloat16()), torch.bfloat16).dtype == torch.bfloat16


def test_what_is_not_finite_is_named() -> None:
    codes, keys, values = made("e2m1", "e2m1")
    keys[0, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="a key holds 1 values"):
        codes.encode_keys(keys)
    values[0, 0, 0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match="a value holds"):
        codes.encode_values(values)


def test_values_beyond_the_scales_are_counted_when_asked() -> None:
    codes, keys, _ = made("e2m1", "e2m1")
    codes.encode_keys(keys)
    assert codes.beyond is None
    codes.beyond = [0, 0]
    codes.encode_keys(keys * 100)
    assert codes.beyond == [keys.numel(), int((keys.abs() * 100 / codes.key_scale > 12).sum())]
    assert codes.beyond[1] > 0


def test_descriptions_are_read_back_or_refused() -> None:
    spec = made("e2m1", "e4m3")[0].spec
    assert CacheSpec.from_json(spec.to_json()) == spec
    with pytest.raises(CheckpointError, match="needs a newer llm-fp4"):
        CacheSpec.from_json({**spec.to_json(), "rotated": False})
    with pytest.raises(CheckpointError, match="has the sizes"):
        CacheSpec.from_json({**spec.to_json(), "heads": 0})
