"""Tokens far larger than the others, which must not be all that a search sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from llm_fp4.pipeline.importance import balanced_importance
from llm_fp4.pipeline.sites import BALANCED, decide_site, quantized_layers
from llm_fp4.recipe import Recipe
from llm_fp4.statistics import Importance, TokenStore

CHANNELS = 64


def rows_with_a_sink() -> Tensor:
    """Return (512, 64) rows, correlated, of which one is a thousand times larger and points elsewhere."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(512, 24, generator=generator) @ torch.randn(24, CHANNELS, generator=generator)
    rows[7] = 1000 * torch.randn(CHANNELS, generator=generator)
    return rows


def stored(rows: Tensor, folder: Path) -> TokenStore:
    folder.mkdir(exist_ok=True)
    store = TokenStore(folder / "rows", rows.shape[1])
    store.append(rows)
    return store


def ordinary_error(folder: Path, search: dict[str, Any], **rules: Any) -> float:
    """Return the relative squared error of the outputs of all tokens but the large one."""
    torch.manual_seed(1)
    linear, rows = nn.Linear(CHANNELS, 96), rows_with_a_sink()
    recipe = Recipe.model_validate({"search": {"rounds": 1, "compensation": "gptq", **search}, **rules})
    plans: dict[str, Any] = {"weights": {}, "inputs": {}}
    decided = decide_site(["l"], {"l": linear}, stored(rows, folder), recipe, {}, plans, torch.device("cpu"))
    assert (BALANCED in plans["inputs"]["l"]["reason"]) == ("outlier_tokens" in search)
    others = rows[torch.arange(len(rows)) != 7]
    with torch.no_grad():
        exact = linear(others)
        return float((quantized_layers(decided)["l"](others) - exact).square().sum() / exact.square().sum())


BLOCKS = {"granularity": "per_block", "block_size": 32, "scale_dtype": "e8m0", "formats": ["e2m1"]}


@pytest.mark.parametrize(
    "rules",
    [
        {"inputs": {"granularity": "per_token"}},
        {"weights": BLOCKS, "inputs": {**BLOCKS, "shift": False}},
    ],
    ids=["per token", "blocks"],
)
def test_ordinary_tokens_are_served_beside_an_outlier(tmp_path: Path, rules: dict[str, Any]) -> None:
    alone = ordinary_error(tmp_path / "alone", {}, **rules)
    balanced = ordinary_error(tmp_path / "balanced", {"outlier_tokens": 4}, **rules)
    assert balanced < 0.8 * alone


def test_outliers_count_together_as_all_others_do(tmp_path: Path) -> None:
    rows = rows_with_a_sink()
    rows[100] = -3 * rows[7]
    found = balanced_importance(stored(rows, tmp_path), {"l": torch.zeros(3, CHANNELS)}, 16.0)
    assert found is not None
    outlier = torch.zeros(len(rows), dtype=torch.bool)
    outlier[[7, 100]] = True
    counted = rows.square().sum(1) * found.tokens
    torch.testing.assert_close(counted[outlier].sum(), counted[~outlier].sum())
    torch.testing.assert_close(counted[100] / counted[7], torch.tensor(9.0))
    assert found.tokens[~outlier].unique().numel() == 1
    torch.testing.assert_close(found.tokens.mean(), torch.tensor(1.0))
    assert found.outputs["l"].tolist() == [1.0, 1.0, 1.0]


def test_what_tokens_count_by_already_is_kept(tmp_path: Path) -> None:
    rows = rows_with_a_sink()
    known = Importance(torch.rand(len(rows), generator=torch.Generator().manual_seed(4)) + 0.5, {"l": torch.tensor([2.0, 0.5])})
    found = balanced_importance(stored(rows, tmp_path), {"l": torch.zeros(2, CHANNELS)}, 16.0, known)
    assert found is not None
    assert found.outputs is known.outputs
    counted = rows.square().sum(1) * found.tokens
    torch.testing.assert_close(counted[7], counted.sum() / 2)
    torch.testing.assert_close(found.tokens[0] / found.tokens[1], known.tokens[0] / known.tokens[1])


def test_tokens_that_need_no_balance_are_left_alone(tmp_path: Path) -> None:
    weights = {"l": torch.zeros(3, CHANNELS)}
    even = torch.randn(64, CHANNELS, generator=torch.Generator().manual_seed(3))
    assert balanced_importance(stored(even, tmp_path / "even"), weights, 4.0) is None
    few = even.clone()
    few[0] *= 6  # an outlier with less energy than the 63 others together
    assert balanced_importance(stored(few, tmp_path / "few"), weights, 4.0) is None
    empty = torch.zeros_like(even)
    empty[:20] = even[:20]  # the median is nothing, and so is what all others have
    assert balanced_importance(stored(empty, tmp_path / "empty"), weights, 4.0) is None


@pytest.mark.parametrize(
    ("wish", "named"),
    [
        ({"search": {"outlier_tokens": 0.5}}, "greater than or equal to 1"),
        ({"method": "minmax", "search": {"outlier_tokens": 4}}, "search.outlier_tokens goes with a search"),
    ],
)
def test_where_the_key_cannot_be(wish: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        Recipe.model_validate(wish)
