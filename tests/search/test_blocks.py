"""Block scales and their error compensation: never worse than rounding to nearest, and what is shared and stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llm_fp4.errors import RecipeError
from llm_fp4.kernels.simulate import fake_quantize_input
from llm_fp4.numerics import PerBlock, fake_quantize, max_scale, neighbour, parse, scale_values, second_scale
from llm_fp4.plan import SiteResult
from llm_fp4.recipe import Recipe, load_recipe
from llm_fp4.search import search_site
from llm_fp4.search.block_compensation import BlockGrid, compensate_blocks, fit_scales, refine_blocks
from llm_fp4.search.block_scales import search_scales
from llm_fp4.search.weights import output_loss
from llm_fp4.statistics import Gram, SiteStatistics, TokenStore

E2M1 = parse("e2m1")


@pytest.fixture
def site(tmp_path: Path) -> SiteStatistics:
    """Correlated input of 72 channels (blocks of 16 and 32 end within), 600 tokens."""
    torch.manual_seed(1)
    store = TokenStore(tmp_path / "rows", 72)
    mixing = torch.eye(72) + 0.3 * torch.randn(72, 72)
    store.append(torch.randn(600, 72) @ mixing * torch.exp(torch.randn(72)))
    return SiteStatistics("site", store, torch.device("cpu"))


def weights() -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {"q": torch.randn(32, 72) / 7, "k": torch.randn(16, 72)}


def recipe(name: str, **search: object) -> Recipe:
    found = load_recipe(name)
    return found.model_copy(update={"search": found.search.model_copy(update=search)})


def run(site: SiteStatistics, wish: Recipe) -> SiteResult:
    return search_site("site", weights(), site, {n: wish.rule(n) for n in weights()}, wish)


def error(site: SiteStatistics, result: SiteResult) -> float:
    """Return the relative squared output error over all tokens, computed without Gram matrices."""
    rows, lost, energy = site.tokens.rows, 0.0, 0.0
    plan = result.input
    quantized = rows if plan is None else fake_quantize_input(rows, plan.spec, plan.scale, None, None)
    for n, w in weights().items():
        chosen = result.weights[n]
        values = result.rounded.get(n, w)
        values = fake_quantize(values, chosen.step(72), chosen.format)
        target = rows.double() @ w.double().t()
        lost += float((quantized.double() @ values.double().t() - target).square().sum())
        energy += float(target.square().sum())
    return lost / energy


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_each_step_lowers_the_output_error(site: SiteStatistics, kind: str) -> None:
    nearest, searched = run(site, recipe(f"{kind}-rtn")), run(site, recipe(kind, compensation="none"))
    once, whole = run(site, recipe(kind, sweeps=0, starts=1)), run(site, recipe(kind))
    errors = [error(site, r) for r in (nearest, searched, once, whole)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.8 * errors[0]
    for result, measured in zip((nearest, searched, once, whole), errors, strict=True):
        assert result.input is not None
        assert result.input.error == pytest.approx(measured, rel=1e-3)


def test_operands_share_the_second_scale_and_inputs_are_dynamic(site: SiteStatistics) -> None:
    result = run(site, recipe("nvfp4"))
    assert result.input is not None
    assert result.input.spec.granularity == "per_block_16_e4m3"
    q, k = result.weights["q"], result.weights["k"]
    assert q.scale.dtype == torch.float8_e4m3fn
    assert q.second_scale is not None
    assert torch.equal(q.second_scale, k.second_scale)
    assert scale_values(k.scale).max() > 4 * scale_values(q.scale).max()  # k is seven times larger
    mx = run(site, recipe("mxfp4"))
    assert mx.weights["q"].scale.dtype == torch.uint8
    assert mx.weights["q"].second_scale is None


def test_weight_only_blocks(site: SiteStatistics) -> None:
    wish = Recipe.model_validate({**load_recipe("nvfp4").model_dump(), "bits": {"embedding": 16, "activation": 16}})
    result = run(site, wish)
    assert result.input is None
    assert error(site, result) < error(site, run(site, recipe("nvfp4")))


def test_the_search_uses_scales_that_map_the_largest_value_to_four(site: SiteStatistics) -> None:
    blocks, w = PerBlock(16, "e4m3"), weights()["q"]
    second = second_scale(w.abs().amax(), E2M1)
    top = max_scale(blocks.absmax(w), second, E2M1, blocks)
    gram = Gram(site.gram, None, None)
    found = search_scales(w, gram, E2M1, blocks, top, second, joint=False)
    ratio = scale_values(found) / scale_values(top)
    assert bool((ratio > 1.3).any())
    assert bool((ratio < 0.95).any())
    grid = BlockGrid(E2M1, blocks, second)
    losses = [
        output_loss(w, fake_quantize(w, grid.step(scale, 72), E2M1), gram)
        for scale in (top, found, search_scales(w, gram, E2M1, blocks, top, second, joint=True))
    ]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("blocks", [PerBlock(16, "e4m3"), PerBlock(32, "e8m0"), PerBlock(24, "float16")], ids=lambda b: b.name)
def test_compensated_values_lie_on_the_stored_grid(site: SiteStatistics, blocks: PerBlock) -> None:
    w = weights()["q"]
    grid = BlockGrid(E2M1, blocks, second_scale(w.abs().amax(), E2M1) if blocks.two_level else None)
    values, stored = compensate_blocks(w, Gram(site.gram, None, None), grid, recipe("nvfp4").search)
    assert stored.dtype == blocks.torch_dtype
    assert torch.equal(fake_quantize(values, grid.step(stored, 72), E2M1), values)


def test_refinement_never_loses(site: SiteStatistics) -> None:
    w, blocks = weights()["q"], PerBlock(16, "e4m3")
    grid = BlockGrid(E2M1, blocks, second_scale(w.abs().amax(), E2M1))
    stored = neighbour(max_scale(blocks.absmax(w), grid.second, E2M1, blocks), 0, blocks)
    values = fake_quantize(w, grid.step(stored, 72), E2M1)
    gram = Gram(site.gram, None, None)
    losses = [output_loss(w, refine_blocks(w, values, stored, site.gram, grid, n)[0], gram) for n in range(4)]
    assert losses == sorted(losses, reverse=True)
    levels = (values / grid.step(stored, 72)).round()
    fitted = fit_scales(w.t().contiguous(), levels.t().contiguous(), stored, site.gram, grid)
    assert output_loss(w, levels * grid.step(fitted, 72), gram) < losses[0]


def test_an_all_zero_weight(site: SiteStatistics) -> None:
    for name in ("nvfp4", "mxfp4", "nvfp4-rtn", "mxfp4-rtn"):
        wish = recipe(name)
        result = search_site("site", {"q": torch.zeros(8, 72)}, site, {"q": wish.rule("q")}, wish)
        plan = result.weights["q"]
        assert bool((plan.step(72) > 0).all())
        assert not result.rounded.get("q", torch.zeros(())).any()


def test_half_block_rules_are_refused() -> None:
    with pytest.raises(RecipeError, match="block scales on only one of weight and input"):
        Recipe.model_validate({"weights": {"granularity": "per_block"}}).rule("q")
    with pytest.raises(RecipeError, match="smoothquant has no block scales"):
        Recipe.model_validate({**load_recipe("nvfp4-rtn").model_dump(), "method": "smoothquant"}).rule("q")
    mixed = {**load_recipe("nvfp4").model_dump(), "overrides": [
        {"targets": ["down"], "weight_granularity": "per_row", "input_granularity": "per_token"}
    ]}  # fmt: skip
    rule = Recipe.model_validate(mixed).rule("down")
    assert rule.weight_blocks is None
    assert rule.input_blocks is None
