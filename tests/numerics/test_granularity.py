import pytest
import torch

from llm_fp4.errors import RecipeError
from llm_fp4.numerics import (
    Granularity,
    PerBlock,
    PerChannel,
    PerRow,
    PerTensor,
    fake_quantize,
    parse,
    parse_granularity,
    scale_of_max,
)

X = torch.tensor([[1.0, -9.0, 2.0, 0.5, -3.0], [0.0, 4.0, -8.0, 7.0, 6.0]])

CASES: list[tuple[Granularity, list]] = [
    (PerTensor(), 9.0),
    (PerRow(), [9.0, 8.0]),
    (PerChannel(), [1.0, 9.0, 8.0, 7.0, 6.0]),
    (PerBlock(2), [[9.0, 2.0, 3.0], [4.0, 8.0, 6.0]]),  # the last block is short
    (PerBlock(3), [[9.0, 3.0], [8.0, 7.0]]),
    (PerBlock(5), [[9.0], [8.0]]),
    (PerBlock(64), [[9.0], [8.0]]),
    (PerBlock(1), X.abs().tolist()),
]


@pytest.mark.parametrize(("granularity", "expected"), CASES)
def test_absmax_has_the_shape_of_the_scale(granularity: Granularity, expected: list) -> None:
    assert granularity.absmax(X).tolist() == expected


@pytest.mark.parametrize(("granularity", "expected"), CASES)
def test_expand_gives_every_element_its_own_scale(granularity: Granularity, expected: list) -> None:
    """The largest magnitude of its group is no smaller than the element, and is reached in each group."""
    wide = granularity.expand(granularity.absmax(X), tuple(X.shape)).broadcast_to(X.shape)
    assert bool((wide >= X.abs()).all())
    assert set(X.abs()[wide == X.abs()].tolist()) >= set(torch.tensor(expected).flatten().tolist())


@pytest.mark.parametrize(
    ("granularity", "shape"),
    [(PerTensor(), ()), (PerRow(), (2, 3)), (PerChannel(), (7,)), (PerBlock(4), (2, 3, 2)), (PerBlock(7), (2, 3, 1))],
)
def test_shapes_in_three_dimensions(granularity: Granularity, shape: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, 7)
    top = granularity.absmax(x)
    assert top.shape == shape
    assert torch.broadcast_shapes(granularity.expand(top, (2, 3, 7)).shape, x.shape) == x.shape


@pytest.mark.parametrize(("granularity", "_expected"), CASES)
def test_zero_rows_dead_channels_and_zero_tensors_have_scale_one(granularity: Granularity, _expected: list) -> None:
    fmt = parse("e2m1")
    x = X.clone()
    x[1] = 0
    x[:, 2] = 0
    for tensor in (x, torch.zeros(2, 5)):
        top = granularity.absmax(tensor)
        scale = scale_of_max(top, fmt)
        assert bool((scale[top == 0] == 1).all())
        wide = granularity.expand(scale, (2, 5))
        out = fake_quantize(tensor, wide, fmt)
        assert bool(torch.isfinite(out).all())
        assert bool((out[tensor == 0] == 0).all())


def test_blocks_are_independent() -> None:
    """A large value spoils its own block only; the short last block is its own."""
    fmt, blocks = parse("e1m2"), PerBlock(4)
    x = torch.tensor([[7.0, 1.0, 2.0, 3.0, 700.0, 1.0, 1.0, 1.0, 0.7, 0.1]])
    out = fake_quantize(x, blocks.expand(scale_of_max(blocks.absmax(x), fmt), (1, 10)), fmt)
    expected = torch.tensor([[7.0, 1.0, 2.0, 3.0, 700.0, 0.0, 0.0, 0.0, 0.7, 0.1]])
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("granularity", [g for g, _ in CASES])
def test_names_parse_back(granularity: Granularity) -> None:
    assert parse_granularity(granularity.name) == granularity


@pytest.mark.parametrize("name", ["per_block", "per_block_0", "per_block_-4", "per_block_x", "per_token", "", "block_32"])
def test_unknown_granularity_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="unknown granularity"):
        parse_granularity(name)


@pytest.mark.parametrize("size", [0, -1])
def test_impossible_block_size_is_refused(size: int) -> None:
    with pytest.raises(RecipeError, match=f"block_size {size} is impossible"):
        PerBlock(size)
