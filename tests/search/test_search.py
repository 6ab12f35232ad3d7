"""The search's losses against plain computation, and what its choices must satisfy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llm_fp4.errors import CalibrationError
from llm_fp4.kernels.simulate import fake_quantize_input
from llm_fp4.numerics import fake_quantize, formats_of_width, parse, scale_of_max
from llm_fp4.plan import InputPlan, InputSpec
from llm_fp4.recipe import Recipe, SearchRules, ShiftRange
from llm_fp4.search import search_site
from llm_fp4.search.compensation import compensate, compensated
from llm_fp4.search.embedding import embedding_plan
from llm_fp4.search.factor import Factor, damped
from llm_fp4.search.grids import Log2Grid, PaperGrid, search_formats
from llm_fp4.search.inputs import InputChoice, OutputError
from llm_fp4.search.ranking import as_operand
from llm_fp4.search.refine import fit_scale, refine
from llm_fp4.search.shift import channel_shift, shift_limits
from llm_fp4.search.sinks import sink_ratio
from llm_fp4.search.weights import choose_weight, losses_by_tokens, row_losses, weight_loss
from llm_fp4.statistics import FloatRows, Gram, SiteStatistics, TokenStore


@pytest.fixture
def site(tmp_path: Path) -> SiteStatistics:
    """An input of 48 channels whose scales differ by powers of ten, 700 tokens."""
    torch.manual_seed(1)
    store = TokenStore(tmp_path / "rows", 48)
    channel = torch.exp(1.5 * torch.randn(48))
    mixing = torch.eye(48) + 0.2 * torch.randn(48, 48)
    for _ in range(7):
        store.append(torch.randn(100, 48) @ mixing * channel)
    return SiteStatistics("site", store, torch.device("cpu"))


def weights() -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {"q": torch.randn(32, 48) / 7, "k": torch.randn(16, 48) / 7}


def output_error(statistics: SiteStatistics, weight: Tensor, rounded: Tensor, quantized_rows: Tensor) -> float:
    target = statistics.tokens.rows.double() @ weight.double().t()
    return float((quantized_rows.double() @ rounded.double().t() - target).square().sum())


def test_gram_loss_is_the_output_error(site: SiteStatistics) -> None:
    weight = weights()["q"]
    spec = InputSpec(parse("e2m1"))
    scale = scale_of_max(site.channel_absmax.amax(), spec.format)
    rows = fake_quantize_input(site.tokens.rows, spec, scale, None, None)
    rounded = fake_quantize(weight, scale_of_max(weight.abs().amax(1), spec.format)[:, None], spec.format)
    gram = site.quantized_gram(lambda x: fake_quantize_input(x, spec, scale, None, None))
    assert gram.eq is not None
    assert gram.ee is not None
    loss = weight_loss(weight, rounded, gram.qq, weight @ gram.eq).sum() + ((weight @ gram.ee) * weight).sum()
    assert float(loss) == pytest.approx(output_error(site, weight, rounded, rows), rel=1e-4)


def test_losses_by_tokens_are_those_by_gram_matrices(site: SiteStatistics) -> None:
    weight, spec = weights()["q"], InputSpec(parse("e2m1"))
    scale = scale_of_max(site.channel_absmax.amax(), spec.format)
    rounded = fake_quantize(weight, scale_of_max(weight.abs().amax(1), spec.format)[:, None], spec.format)
    for quantize in (None, lambda x: fake_quantize_input(x, spec, scale, None, None)):
        found = losses_by_tokens(weight, rounded.__getitem__, site, quantize)
        assert torch.allclose(found, row_losses(weight, rounded.__getitem__, site.quantized_gram(quantize)), rtol=1e-4)


@pytest.mark.parametrize("outputs", [20, 200], ids=["direct form", "quadratic form"])
def test_sample_error_is_the_output_error(site: SiteStatistics, outputs: int) -> None:
    weight = torch.randn(outputs, 48) / 7
    rounded = fake_quantize(weight, scale_of_max(weight.abs().amax(1), parse("e2m1"))[:, None], parse("e2m1"))
    rows = site.tokens.rows
    rounding = (InputSpec(parse("e2m1")), scale_of_max(rows.abs().amax(), parse("e2m1")), None, None)
    quantized = fake_quantize_input(rows, *rounding)
    error = OutputError(rows, torch.ones(len(rows)), [weight[:7], weight[7:]])
    exact = output_error(site, weight, weight, quantized)
    assert float(error(lambda x: fake_quantize_input(x, *rounding))) == pytest.approx(exact, rel=2e-2)
    error = error.under([rounded[:7], rounded[7:]])
    assert float(error(lambda x: fake_quantize_input(x, *rounding))) == pytest.approx(
        output_error(site, weight, rounded, quantized), rel=2e-2
    )


def test_weight_choice_beats_every_format_at_its_maximum(site: SiteStatistics) -> None:
    weight = weights()["q"]
    gram = site.quantized_gram(None)
    choice, scales = choose_weight(weight, gram, formats_of_width(4), Log2Grid(-1.0))
    found = weight_loss(weight, choice.values(weight), gram.qq, None).sum()
    assert choice.format in scales
    assert len(scales) == 2  # the third format did not survive the coarse sweep
    for fmt in formats_of_width(4):
        maximal = fake_quantize(weight, scale_of_max(weight.abs().amax(1), fmt)[:, None], fmt)
        assert found <= weight_loss(weight, maximal, gram.qq, None).sum()


def test_log2_grid_finds_what_an_exhaustive_search_finds() -> None:
    target = torch.tensor([0.3, 1.0, 0.77])
    grid = Log2Grid(-2.0)
    best = grid.sweep(lambda s: (s - target).square(), torch.ones(3), parse("e2m1"))
    grid.refine(best, again=False)
    scale, value = best.scale, best.value
    fine = torch.exp2(torch.linspace(-2, 0.25, 2000))[:, None]
    exhaustive = (fine - target).square().amin(0)
    assert (value <= exhaustive + 1.5e-3).all()
    assert torch.equal(value, (scale - target).square())


def test_later_rounds_never_lose_the_scale_they_start_from() -> None:
    current = torch.tensor([0.5])
    fmt = parse("e2m1")
    found = search_formats({fmt: lambda s: (s - 0.5).abs()}, {fmt: torch.ones(1)}, Log2Grid(-2.0), {fmt: current})
    assert torch.equal(found[fmt].scale, current)


def test_paper_grid_is_a_single_point_where_the_bias_is_zero() -> None:
    fmt = parse("e2m1")
    seen: list[float] = []

    def loss(scale: Tensor) -> Tensor:
        seen.append(round(float(scale), 6))
        return scale

    PaperGrid(10).sweep(loss, fmt.scale_of_bias(0.0).float().reshape(1), fmt)
    assert len(set(seen)) == 1
    seen.clear()
    PaperGrid(10).sweep(loss, fmt.scale_of_bias(3.0).float().reshape(1), fmt)
    assert len(set(seen)) == 11


def test_shift_is_equation_15() -> None:
    fmt = parse("e2m1")
    maxima = torch.tensor([6.0, 3.0, 1.4, 0.7, 0.01, 0.0])
    bias = fmt.bias_of_max(maxima[:5])
    expected = (bias.round() - bias.min().round()).clamp(0, 3)
    shift = channel_shift(maxima, fmt, fmt.max_shift)
    assert shift[:5].tolist() == expected.tolist()
    assert int(shift[5]) == 3  # a dead channel


def test_sinks_are_recognised() -> None:
    tokens = torch.cat((torch.ones(99), torch.tensor([5000.0])))
    assert sink_ratio(tokens) == 5000
    assert sink_ratio(torch.zeros(4)) == 1


@pytest.mark.parametrize("name", ["e2m1", "e1m2", "e3m0", "e2m3"])
def test_compensation_lowers_the_output_error_and_stays_on_the_grid(site: SiteStatistics, name: str) -> None:
    fmt, weight = parse(name), weights()["q"]
    gram = site.quantized_gram(None)
    scale = scale_of_max(weight.abs().amax(1), fmt)
    values = compensate(weight.t(), Factor(damped(gram.qq, 0.01)).feedback(), scale, fmt).t()
    nearest = fake_quantize(weight, scale[:, None], fmt)
    assert torch.equal(fake_quantize(values, scale[:, None], fmt), values)
    assert weight_loss(weight, values, gram.qq, None).sum() < 0.8 * weight_loss(weight, nearest, gram.qq, None).sum()


def test_feedback_is_that_of_the_inverse_hessian(site: SiteStatistics) -> None:
    """GPTQ moves column j by -U[i, j] / U[i, i] times an error of column i as it stood, U the inverse's upper Cholesky factor."""
    hessian = damped(site.gram, 0.01)
    found = Factor(hessian).feedback()
    ordered = hessian[found.order][:, found.order].double()
    upper = torch.linalg.cholesky(torch.linalg.inv(ordered), upper=True)
    # errors as columns stood are those against the weight times pull, so the one is the inverse of the other
    assert torch.allclose(torch.linalg.inv(found.pull.double()), upper / upper.diagonal()[:, None], atol=1e-4)


@pytest.mark.parametrize("name", ["e2m1", "e1m2", "e3m0"])
def test_every_sweep_of_refinement_lowers_the_error_and_stays_on_the_grid(site: SiteStatistics, name: str) -> None:
    fmt, weight = parse(name), weights()["q"]
    hessian = damped(site.gram, 0.01)
    scale = scale_of_max(weight.abs().amax(1), fmt)
    values = compensate(weight.t(), Factor(hessian).feedback(), scale, fmt).t()
    losses = [float(weight_loss(weight, values, hessian, None).sum())]
    for sweeps in (1, 2, 4):
        refined, fitted = refine(weight.t(), values.t().clone(), hessian, scale, fmt, sweeps)
        refined = refined.t()
        assert torch.equal(fake_quantize(refined, fitted[:, None], fmt), refined)
        losses.append(float(weight_loss(weight, refined, hessian, None).sum()))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.97 * losses[0]


def test_more_starts_find_a_lower_error(site: SiteStatistics) -> None:
    fmt, weight = parse("e2m1"), weights()["q"]
    scale = scale_of_max(weight.abs().amax(1), fmt)
    losses = []
    for starts in (1, 3, 5):
        values, fitted = compensated(weight, Gram(site.gram, None, None), scale, fmt, SearchRules(starts=starts))
        assert torch.equal(fake_quantize(values, fitted[:, None], fmt), values)
        losses.append(float(weight_loss(weight, values, damped(site.gram, SearchRules().damping), None).sum()))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_a_fitted_scale_is_the_best_one_and_an_empty_row_keeps_its_own(site: SiteStatistics) -> None:
    weight = weights()["q"].t()
    levels = weight.div(0.1).round()
    levels[:, 3] = 0
    first = torch.full((weight.shape[1],), 0.1)
    fitted = fit_scale(weight, levels, site.gram, first)
    assert fitted[3] == first[3]

    def loss(scale: Tensor) -> Tensor:
        return weight_loss(weight.t(), (levels * scale).t(), site.gram, None)

    assert (loss(fitted) <= loss(fitted * 1.01) + 1e-3).all()
    assert (loss(fitted) <= loss(fitted * 0.99) + 1e-3).all()


def site_error(statistics: SiteStatistics, recipe: Recipe) -> float:
    named = weights()
    result = search_site("site", named, statistics, {n: recipe.rule(n) for n in named}, recipe)
    plan = result.input
    assert plan is not None
    rows = fake_quantize_input(statistics.tokens.rows, plan.spec, plan.scale, plan.shift, plan.smooth)
    total = 0.0
    for n, w in named.items():
        source = w if plan.smooth is None else w * plan.smooth
        rounded = result.rounded.get(n, fake_quantize(source, result.weights[n].scale[:, None], result.weights[n].format))
        total += output_error(statistics, w, rounded, rows)
    energy = sum(output_error(statistics, w, torch.zeros_like(w), rows) for w in named.values())
    if recipe.method.startswith("fpq"):
        assert plan.error == pytest.approx(total / energy, rel=0.02)  # what the plan says is what is measured
    return total / energy


def test_methods_rank_as_in_the_paper(site: SiteStatistics) -> None:
    recipe = Recipe()
    error = {m: site_error(site, recipe.model_copy(update={"method": m})) for m in ("minmax", "fpq-baseline", "fpq")}
    compensated = recipe.model_copy(update={"search": recipe.search.model_copy(update={"compensation": "gptq"})})
    assert site_error(site, compensated) < error["fpq"] < error["fpq-baseline"] < error["minmax"]


def test_smoothquant_beats_plain_integers_on_uneven_channels(site: SiteStatistics) -> None:
    recipe = Recipe(method="smoothquant")
    plain = Recipe.model_validate({"method": "minmax", "weights": {"formats": ["int"]}, "inputs": {"formats": ["int"]}})
    assert site_error(site, recipe) < site_error(site, plain)


def test_sink_sites_get_a_scale_per_token(site: SiteStatistics) -> None:
    site.tokens.rows[0] *= 3000
    named = weights()
    for sinks, expected in (("per_token", "per_token"), ("static", "per_tensor")):
        recipe = Recipe.model_validate({"inputs": {"sinks": sinks}, "search": {"rounds": 1}})
        plan = search_site("site", named, site, {n: recipe.rule(n) for n in named}, recipe).input
        assert plan is not None
        assert plan.spec.granularity == expected
        assert ("times the median" in plan.reason) == (sinks == "per_token")


def test_zero_weights_and_inputs_are_no_special_case(tmp_path: Path) -> None:
    store = TokenStore(tmp_path / "rows", 8)
    store.append(torch.zeros(32, 8))
    statistics = SiteStatistics("dead", store, torch.device("cpu"))
    recipe = Recipe.model_validate({"search": {"rounds": 1}})
    result = search_site("dead", {"w": torch.zeros(4, 8)}, statistics, {"w": recipe.rule("w")}, recipe)
    assert result.input is not None
    assert torch.isfinite(result.input.scale)
    assert torch.isfinite(result.weights["w"].scale).all()


def test_ranking_operands_keep_values_small_integers_exact() -> None:
    levels = torch.arange(-96, 97).float().reshape(1, -1)
    assert torch.equal(as_operand(levels).float(), levels)


def test_gram_without_rounding_has_no_error_part(site: SiteStatistics) -> None:
    gram = site.quantized_gram(None)
    assert isinstance(gram, Gram)
    assert gram.eq is None
    assert torch.allclose(gram.qq, site.tokens.rows.t() @ site.tokens.rows, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(("name", "max_shift"), [("e2m1", 3), ("e1m2", 1), ("e3m0", 0), ("e1m6", 0)])
def test_gram_of_integers_is_the_gram_of_the_values(site: SiteStatistics, name: str, max_shift: int) -> None:
    fmt = parse(name)
    shift = torch.randint(0, max_shift + 1, (48,), dtype=torch.uint8) if max_shift else None
    choice = InputChoice(InputSpec(fmt, max_shift=max_shift), scale_of_max(site.channel_absmax.amax(), fmt), shift, 0.0)
    assert choice.unit is not None
    exact, plain = site.quantized_gram(choice.quantize, choice.unit), site.quantized_gram(choice.quantize)
    assert torch.allclose(exact.qq, plain.qq, rtol=1e-5, atol=1e-5 * float(plain.qq.abs().max()))
    assert exact.eq is not None
    assert plain.eq is not None
    assert torch.equal(exact.eq, plain.eq)
    assert InputChoice(InputSpec(fmt, "per_token"), torch.ones(()), None, 0.0).unit is None


def test_sampled_sums_estimate_sums_over_all_tokens(site: SiteStatistics) -> None:
    site.tokens.rows[5] *= 100
    rows, weight = site.sample(256)
    assert len(rows) == 256
    estimate, truth = float((rows.square().sum(1) * weight).sum()), float(site.tokens.rows.square().sum())
    assert estimate == pytest.approx(truth, rel=0.02)  # the heavy token is in it, counted once


def test_compensation_makes_up_for_the_error_of_the_input_too(site: SiteStatistics) -> None:
    weight, fmt = weights()["q"], parse("e2m1")
    spec = InputSpec(fmt)
    scale = scale_of_max(site.channel_absmax.amax(), fmt)
    gram = site.quantized_gram(lambda x: fake_quantize_input(x, spec, scale, None, None))
    assert gram.eq is not None
    step = scale_of_max(weight.abs().amax(1), fmt)
    plain = SearchRules(sweeps=0, starts=1)
    knowing, _ = compensated(weight, gram, step, fmt, plain)
    ignorant, _ = compensated(weight, Gram(gram.qq, None, None), step, fmt, plain)
    rows = fake_quantize_input(site.tokens.rows, spec, scale, None, None)
    assert output_error(site, weight, knowing, rows) < 0.9 * output_error(site, weight, ignorant, rows)


def test_compensation_of_a_dead_input_is_plain_rounding_or_as_good() -> None:
    weight = weights()["q"]
    gram = Gram(torch.zeros(48, 48), torch.zeros(48, 48), torch.zeros(48, 48))
    values, scale = compensated(weight, gram, scale_of_max(weight.abs().amax(1), parse("e2m1")), parse("e2m1"), SearchRules())
    assert torch.isfinite(values).all()
    assert (scale > 0).all()


def test_a_shared_embedding_serves_the_head_better_than_its_rows_alone() -> None:
    torch.manual_seed(4)
    table = torch.randn(64, 48)
    inputs = torch.randn(400, 48) @ torch.diag(torch.exp(2 * torch.randn(48)))
    gram = inputs.t() @ inputs
    rules = Recipe().search
    alone, shared = (embedding_plan("e", table, formats_of_width(4), rules, g)[1] for g in (None, gram))

    def head_error(values: Tensor) -> float:
        return float((inputs @ (values - table).t()).square().sum())

    def row_error(values: Tensor) -> float:
        return float((values - table).square().sum())

    assert head_error(shared) < head_error(alone)
    assert row_error(alone) < row_error(shared) < 2 * row_error(alone)  # the rows' own error is kept in sight


@pytest.mark.parametrize(
    ("name", "shift_range", "expected"),
    [
        ("e1m2", "format", [1]), ("e1m2", "int8", [4]), ("e1m2", "search", [0, 1, 4]), ("e2m1", "format", [3]), ("e2m1", "int8", [3]),
        ("e2m1", "search", [0, 3]), ("e3m0", "int8", [0]), ("e3m0", "search", [0, 7]), ("e4m3", "int8", [0]), ("e2m1", 2, [2]),
        ("e1m2", "every", [0, 1, 2, 3, 4]), ("e2m1", "every", [0, 1, 2, 3]), ("e3m0", "every", [0, 7]), ("e4m3", "every", [0, 15]),
    ],
)  # fmt: skip
def test_shift_limits(name: str, shift_range: ShiftRange, expected: list[int]) -> None:
    fmt = parse(name)
    assert shift_limits(fmt, shift_range) == expected
    if shift_range == "int8" and fmt.bits == 4:
        assert fmt.max_level << expected[0] <= 127 < fmt.max_level << (expected[0] + 1)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_token"])
def test_a_searched_shift_range_is_the_best_of_all_ranges(site: SiteStatistics, granularity: str) -> None:
    """The fixture's channels differ by powers of ten: shifts pay, and E1M2 pays most beyond its format's own range."""

    def run(shift_range: str | int, *formats: str) -> InputPlan:
        rules = {"formats": formats, "granularity": granularity, "shift_range": shift_range}
        wish = Recipe.model_validate({"inputs": rules, "search": {"rounds": 2}})
        plan = search_site("site", weights(), site, {n: wish.rule(n) for n in weights()}, wish).input
        assert plan is not None
        return plan

    def error(shift_range: str | int) -> float:
        found = run(shift_range, "e1m2").error
        assert found is not None
        return found

    errors = {k: error(k) for k in (0, "format", "int8", "search", "every")}
    assert errors["int8"] < errors["format"] < errors[0]
    assert errors["search"] == pytest.approx(errors["int8"], rel=1e-6)
    assert errors["every"] == pytest.approx(errors["int8"], rel=1e-6)
    plan = run("search", "e1m2", "e2m1")
    assert plan.shift is not None
    assert plan.spec.limbs == 1
    assert plan.spec.max_shift == int(plan.shift.max()) >= 3


def test_a_searched_shift_range_leaves_even_channels_alone(tmp_path: Path) -> None:
    store = TokenStore(tmp_path / "even", 48)
    store.append(torch.randn(300, 48, generator=torch.Generator().manual_seed(5)).clamp(-2, 2))
    statistics = SiteStatistics("site", store, torch.device("cpu"))
    wish = Recipe.model_validate({"inputs": {"formats": ["e2m1"], "shift_range": "search"}, "search": {"rounds": 1}})
    result = search_site("site", weights(), statistics, {n: wish.rule(n) for n in weights()}, wish)
    assert result.input is not None
    assert result.input.spec.max_shift == 0
    assert result.input.shift is None


def test_compensation_makes_up_for_what_earlier_layers_did(site: SiteStatistics, tmp_path: Path) -> None:
    """The site's rows are what arrives; the float model had others there, and its outputs are what is wanted."""
    arrived = site.tokens.rows
    had, same = (TokenStore(tmp_path / f"{n}.rows", 48) for n in ("float", "same"))
    torch.manual_seed(3)
    had.append(arrived @ (torch.eye(48) + 0.05 * torch.randn(48, 48)))
    same.append(arrived)
    wish = Recipe.model_validate({"search": {"rounds": 1, "compensation": "gptaq"}})

    def lost(wanted: FloatRows | None) -> float:
        weight = weights()["q"]
        result = search_site("site", {"q": weight}, site, {"q": wish.rule("q")}, wish, wanted=wanted)
        plan = result.input
        assert plan is not None
        rows = fake_quantize_input(arrived, plan.spec, plan.scale, plan.shift, None)
        return float((had.rows @ weight.t() - rows @ result.rounded["q"].t()).square().sum())

    assert lost(FloatRows(had)) < 0.9 * lost(None)
    assert lost(FloatRows(same)) == pytest.approx(lost(None), rel=1e-3)


def test_what_error_compensation_inherits_is_the_share_asked_for(site: SiteStatistics, tmp_path: Path) -> None:
    had = TokenStore(tmp_path / "float.rows", 48)
    torch.manual_seed(3)
    had.append(site.tokens.rows @ (torch.eye(48) + 0.05 * torch.randn(48, 48)))
    weight, wish = weights()["q"], Recipe.model_validate({"search": {"rounds": 1, "compensation": "gptaq"}})
    lost = []
    for share in (0.0, 0.5, 1.0):
        result = search_site("site", {"q": weight}, site, {"q": wish.rule("q")}, wish, wanted=FloatRows(had, share=share))
        plan = result.input
        assert plan is not None
        rows = fake_quantize_input(site.tokens.rows, plan.spec, plan.scale, plan.shift, None)
        lost.append(float((had.rows @ weight.t() - rows @ result.rounded["q"].t()).square().sum()))
    assert lost[0] > 1.05 * lost[1] > 1.05**2 * lost[2]


def test_columns_are_visited_by_importance() -> None:
    hessian = torch.diag(torch.tensor([1.0, 9.0, 4.0, 16.0]))
    assert Factor(hessian).feedback().order.tolist() == [3, 1, 2, 0]


def test_damping_is_a_share_of_the_mean_diagonal() -> None:
    hessian = torch.tensor([[4.0, 1.0], [1.0, 8.0]])
    assert damped(hessian, 0.5).tolist() == [[7.0, 1.0], [1.0, 11.0]]


def test_a_singular_input_asks_for_damping_by_name(tmp_path: Path) -> None:
    store = TokenStore(tmp_path / "rows", 48)
    torch.manual_seed(0)
    store.append(torch.randn(100, 1) @ torch.randn(1, 48) * 1e4)
    statistics = SiteStatistics("model.layers.7.mlp", store, torch.device("cpu"))
    wish = Recipe.model_validate({"bits": {"activation": 16}, "search": {"rounds": 1, "compensation": "gptq", "damping": 1e-12}})
    with pytest.raises(CalibrationError, match=r"model\.layers\.7\.mlp.*search\.damping 1e-12.*raise the damping"):
        search_site("model.layers.7.mlp", {"q": weights()["q"]}, statistics, {"q": wish.rule("q")}, wish)
