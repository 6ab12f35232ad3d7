import itertools
import math

import numpy as np
import pytest
import torch
from paper import ALL_FORMATS, largest, value_of_code, values

from llm_fp4.errors import RecipeError
from llm_fp4.numerics import FloatFormat, formats_of_width, levels, parse

BIASES = [0.0, 1.0, 3.7, -2.25, 11.913]

TABLES = {
    "e2m0": [0, 1, 2, 4],
    "e1m1": [0, 1, 2, 3],
    "e2m1": [0, 1, 2, 3, 4, 6, 8, 12],
    "e1m2": [0, 1, 2, 3, 4, 5, 6, 7],
    "e3m0": [0, 1, 2, 4, 8, 16, 32, 64],
    "ue2m2": [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28],
    "ue1m3": list(range(16)),
    "e2m2": [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28],
    # 0, 0.0625..0.1875, 0.25..., 28 in units of 0.0625
    "e3m2": [
        *range(8), *range(8, 16, 2), *range(16, 32, 4), *range(32, 64, 8),
        *range(64, 128, 16), *range(128, 256, 32), *range(256, 512, 64),
    ],
    # 0, 0.125..., 7.5 in units of 0.125
    "e2m3": [*range(16), *range(16, 32, 2), *range(32, 64, 4)],
    "e1m4": list(range(32)),
    "e1m6": list(range(128)),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_value_table(name: str) -> None:
    table = TABLES[name]
    found = levels(parse(name)).tolist()
    assert found[: len(table)] == table
    assert found[len(table) :] == ([] if name.startswith("u") else [-v for v in table])


@pytest.mark.parametrize(
    ("bits", "signed", "names"),
    [
        (3, True, "e1m1 e2m0"),
        (4, True, "e1m2 e2m1 e3m0"),
        (5, True, "e1m3 e2m2 e3m1 e4m0"),
        (6, True, "e1m4 e2m3 e3m2 e4m1 e5m0"),
        (7, True, "e1m5 e2m4 e3m3 e4m2 e5m1 e6m0"),
        (8, True, "e1m6 e2m5 e3m4 e4m3 e5m2"),  # not e6m1, e7m0
        (3, False, "ue1m2 ue2m1 ue3m0"),
        (4, False, "ue1m3 ue2m2 ue3m1 ue4m0"),
        (7, False, "ue1m6 ue2m5 ue3m4 ue4m3 ue5m2"),
        (8, False, "ue1m7 ue2m6 ue3m5 ue4m4 ue5m3"),
    ],
)
def test_formats_of_width(bits: int, signed: bool, names: str) -> None:
    found = formats_of_width(bits, signed)
    assert " ".join(f.name for f in found) == names
    assert all(f.bits == bits and parse(str(f)) == f for f in found)


@pytest.mark.parametrize(("fmt", "bias"), itertools.product(ALL_FORMATS, BIASES))
def test_every_code_has_the_value_of_eq_4(fmt: FloatFormat, bias: float) -> None:
    """The level times the step is the paper's value, for every code, at any real bias."""
    step = fmt.scale_of_bias(bias)
    ours = (levels(fmt).double() * step).numpy()
    np.testing.assert_allclose(ours, values(fmt, bias), rtol=1e-14, atol=0)
    np.testing.assert_allclose(float(fmt.max_level * step), largest(fmt, bias), rtol=1e-14)
    assert value_of_code(0, fmt, bias) == 0.0


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_bias_and_scale_are_inverse_and_eq_7_holds(fmt: FloatFormat) -> None:
    bias = torch.linspace(-20, 20, 41, dtype=torch.float64)
    torch.testing.assert_close(fmt.bias_of_scale(fmt.scale_of_bias(bias)), bias, rtol=0, atol=1e-12)
    maximum = torch.tensor([1e-6, 0.37, 1.0, 12.0, 3124.0], dtype=torch.float64)
    # b = 2^e - log2(max) + log2(2 - 2^-m) - 1
    e, m = fmt.exponent_bits, fmt.mantissa_bits
    eq_7 = [2**e - math.log2(x) + math.log2(2 - 2**-m) - 1 for x in maximum.tolist()]
    torch.testing.assert_close(fmt.bias_of_max(maximum), torch.tensor(eq_7, dtype=torch.float64), rtol=0, atol=1e-12)
    for x, b in zip(maximum.tolist(), fmt.bias_of_max(maximum).tolist(), strict=True):
        assert largest(fmt, b) == pytest.approx(x, rel=1e-12)


def test_the_paper_grid_collapses_for_e2m1_at_12() -> None:
    """A maximum of 12 is bias 0 in E2M1, so multiplying the bias moves nothing (a quirk of the paper's grid)."""
    assert float(parse("e2m1").bias_of_max(12.0)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 7, 8])
def test_int_names_are_the_e1_formats(bits: int) -> None:
    signed, unsigned = parse(f"int{bits}"), parse(f"UINT{bits}")
    assert signed == FloatFormat(1, bits - 2)
    assert levels(signed).tolist()[: 2 ** (bits - 1)] == list(range(2 ** (bits - 1)))
    assert levels(unsigned).tolist() == list(range(2**bits))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("fp4", "unknown number format 'fp4'"),
        ("", "unknown number format ''"),
        ("e2m10", "unknown number format"),
        ("e2m1 ", "unknown number format"),
        ("int16", "unknown number format"),
        ("e0m3", "e0m3 does not exist"),
        ("int1", "does not exist"),
        ("e1m0", "e1m0 has 2 bits"),
        ("int2", "has 2 bits"),
        ("e4m4", "e4m4 has 9 bits"),
        ("int9", "has 9 bits"),
        ("e6m1", "e6m1 spans more than 2\\*\\*63 steps"),
        ("e7m0", "e7m0 spans more than"),
        ("ue8m0", "ue8m0 spans more than"),
        ("ue6m1", "ue6m1 spans more than"),
    ],
)
def test_parse_refuses(name: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        parse(name)


@pytest.mark.parametrize("bits", [-1, 0, 2, 9, 16])
def test_formats_of_width_refuses(bits: int) -> None:
    with pytest.raises(RecipeError, match=f"no formats of {bits} bits"):
        formats_of_width(bits)
    with pytest.raises(RecipeError):
        formats_of_width(bits, signed=False)


def test_max_shift_is_the_papers() -> None:
    """k is clipped to 2^e - 1 (Eq. 15)."""
    assert [parse(n).max_shift for n in ("e1m2", "e2m1", "e3m0", "e4m3")] == [1, 3, 7, 15]
