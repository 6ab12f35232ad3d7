"""Inputs that lie off zero or hardly below it: what is subtracted, what becomes unsigned, and what the biases make up for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_fp4.kernels.simulate import fake_quantize_input
from llm_fp4.numerics import fake_quantize
from llm_fp4.plan import TWO_LIMBS, SiteResult
from llm_fp4.recipe import Recipe
from llm_fp4.search import search_site
from llm_fp4.search.inputs import OutputError
from llm_fp4.search.shift import shift_limits
from llm_fp4.statistics import FloatRows, SiteStatistics, TokenStore

CHANNELS = 40


def statistics(rows: Tensor, folder: Path) -> SiteStatistics:
    store = TokenStore(folder / "rows", CHANNELS)
    store.append(rows)
    return SiteStatistics("site", store, torch.device("cpu"))


def weights() -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {"q": torch.randn(32, CHANNELS) / 7, "k": torch.randn(16, CHANNELS) / 7}


def recipe(inputs: dict[str, Any], **search: Any) -> Recipe:
    return Recipe.model_validate({"inputs": {"sinks": "static", "unsigned": False, **inputs}, "search": {"rounds": 1, **search}})


def output_error(rows: Tensor, result: SiteResult) -> float:
    """Return the relative squared error of the outputs as a layer computes them: offset, rounding, product, bias."""
    plan, total, energy = result.input, 0.0, 0.0
    assert plan is not None
    shifted = rows if plan.offset is None else rows - plan.offset
    quantized = fake_quantize_input(shifted, plan.spec, plan.scale, plan.shift, None).double()
    for n, w in weights().items():
        chosen = result.weights[n]
        stored = result.rounded.get(n, fake_quantize(w, chosen.step(w.shape[1]), chosen.format)).double()
        target = rows.double() @ w.double().t()
        bias = result.bias.get(n, torch.zeros(len(w))).double()
        total += float((quantized @ stored.t() + bias - target).square().sum())
        energy += float(target.square().sum())
    return total / energy


def search(rows: Tensor, rules: Recipe, folder: Path) -> SiteResult:
    named = weights()
    return search_site("site", named, statistics(rows, folder), {n: rules.rule(n) for n in named}, rules)


def biased(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    means = 3 * torch.randn(CHANNELS, generator=torch.Generator().manual_seed(0))
    return torch.randn(600, CHANNELS, generator=generator) + means


def gelu(seed: int = 1) -> Tensor:
    return torch.nn.functional.gelu(2 * torch.randn(600, CHANNELS, generator=torch.Generator().manual_seed(seed)))


def test_means_are_subtracted_where_that_helps_and_the_plan_says_so(tmp_path: Path) -> None:
    plain = search(biased(), recipe({}), tmp_path)
    shifted = search(biased(), recipe({"offset": "mean"}), tmp_path)
    assert shifted.input is not None
    assert shifted.input.spec.offset
    assert shifted.input.offset is not None
    assert torch.allclose(shifted.input.offset, biased().mean(0), atol=1e-5)
    assert "the mean of each channel is subtracted" in shifted.input.reason
    errors = output_error(biased(), plain), output_error(biased(), shifted)
    assert errors[1] < 0.5 * errors[0]
    assert shifted.input.error == pytest.approx(errors[1], rel=0.02)  # relative to the whole output, as without offset
    assert output_error(biased(7), shifted) < 0.5 * output_error(biased(7), plain)  # held-out rows


@pytest.mark.parametrize("compensation", ["none", "gptq"])
@pytest.mark.parametrize(("size", "scale"), [(16, "e4m3"), (32, "e8m0")])
def test_means_are_subtracted_under_block_scales_too(size: int, scale: str, compensation: str, tmp_path: Path) -> None:
    blocks = {"granularity": "per_block", "block_size": size, "scale_dtype": scale, "formats": ["e2m1"]}
    own = {"weights": blocks, "search": {"compensation": compensation}}
    plain = search(biased(), Recipe.model_validate({**own, "inputs": {**blocks, "unsigned": True}}), tmp_path)
    shifted = search(biased(), Recipe.model_validate({**own, "inputs": {**blocks, "offset": "mean"}}), tmp_path)
    assert plain.input is not None
    assert plain.input.offset is None
    assert shifted.input is not None
    assert shifted.input.spec == replace(plain.input.spec, offset=True)
    assert "the mean of each channel is subtracted" in shifted.input.reason
    assert set(shifted.bias) == set(weights())
    assert output_error(biased(7), shifted) < 0.5 * output_error(biased(7), plain)  # held-out rows
    centred = search(gelu() - gelu().mean(0), Recipe.model_validate({**own, "inputs": {**blocks, "offset": "mean"}}), tmp_path)
    assert centred.input is not None
    assert centred.input.offset is None


def test_a_centred_input_is_left_as_it_is(tmp_path: Path) -> None:
    rows = torch.randn(600, CHANNELS, generator=torch.Generator().manual_seed(1))
    result = search(rows, recipe({"offset": "mean", "unsigned": True}), tmp_path)
    assert result.input is not None
    assert result.input.offset is None
    assert result.input.spec.format.signed
    assert result.bias == {}
    assert result.input.reason == ""


@pytest.mark.parametrize("compensation", ["none", "gptq"])
def test_gelu_outputs_become_unsigned(compensation: str, tmp_path: Path) -> None:
    plain = search(gelu(), recipe({}, compensation=compensation), tmp_path)
    unsigned = search(gelu(), recipe({"unsigned": True}, compensation=compensation), tmp_path)
    assert unsigned.input is not None
    assert not unsigned.input.spec.format.signed
    assert unsigned.input.spec.limbs in (1, 2)
    assert unsigned.input.offset is not None
    assert float((gelu(7) - unsigned.input.offset).amin()) > -1e-3
    assert "unsigned, after" in unsigned.input.reason
    assert output_error(gelu(7), unsigned) < 0.8 * output_error(gelu(7), plain)


def test_one_large_token_makes_no_input_unsigned(tmp_path: Path) -> None:
    rows = torch.randn(600, CHANNELS, generator=torch.Generator().manual_seed(1))
    rows[3] = 50 * rows[3].abs()
    result = search(rows, recipe({"unsigned": True}), tmp_path)
    assert result.input is not None
    assert result.input.spec.format.signed


def test_what_is_never_negative_is_unsigned_without_offset(tmp_path: Path) -> None:
    result = search(gelu().relu(), recipe({"unsigned": True}), tmp_path)
    assert result.input is not None
    assert not result.input.spec.format.signed
    assert result.input.offset is None
    assert result.bias == {}
    assert "never negative" in result.input.reason


def test_the_bias_takes_the_mean_error(tmp_path: Path) -> None:
    rows = gelu() + 1.0
    plain, corrected = (search(rows, recipe({}, bias_correction=b), tmp_path) for b in (False, True))
    assert set(corrected.bias) == {"q", "k"}
    errors = output_error(rows, plain), output_error(rows, corrected)
    assert errors[1] < errors[0]
    assert corrected.input is not None
    assert corrected.input.error == pytest.approx(errors[1], rel=0.02)  # the search leaves the mean out


@pytest.mark.parametrize("outputs", [20, 200], ids=["direct form", "quadratic form"])
def test_centered_sample_error_is_the_variance(outputs: int) -> None:
    rows, weight = gelu(), torch.randn(outputs, CHANNELS, generator=torch.Generator().manual_seed(3))
    rounded = (weight * 2).round() / 2

    def quantize(x: torch.Tensor) -> torch.Tensor:
        return (x * 2).round() / 2

    wrong = quantize(rows).double() @ rounded.double().t() - rows.double() @ weight.double().t()
    error = OutputError(rows, torch.ones(len(rows)), [weight], centered=True).under([rounded])
    assert float(error(quantize)) == pytest.approx(float((wrong - wrong.mean(0)).square().sum()), rel=3e-2)  # bfloat16 ranks


def test_centered_grams_are_those_of_rows_less_their_means(tmp_path: Path) -> None:
    from dataclasses import replace

    found = replace(statistics(biased(), tmp_path), centered=True).quantized_gram(torch.round)
    q = biased().round()
    e = biased() - q
    q, e = q - q.mean(0), e - e.mean(0)
    assert found.eq is not None
    assert found.ee is not None
    for ours, expected in ((found.qq, q.t() @ q), (found.eq, e.t() @ q), (found.ee, e.t() @ e)):
        assert torch.allclose(ours, expected, atol=2e-2, rtol=1e-3)


def test_unsigned_formats_stay_on_integers() -> None:
    rules = recipe({"unsigned": True}).rule("q")
    assert [f.name for f in rules.unsigned_formats] == ["ue1m3", "ue2m2", "ue3m1"]
    for fmt in rules.unsigned_formats:
        assert all(fmt.max_level << k <= TWO_LIMBS for r in ("format", "int8", "search", "every", 15) for k in shift_limits(fmt, r))
    assert recipe({"unsigned": True, "formats": ["e2m1", "ue2m2", "int"]}).rule("q").unsigned_formats[0].name == "ue2m2"
    assert recipe({}).rule("q").unsigned_formats == ()


@pytest.fixture
def offsets(tmp_path: Path) -> Callable[..., SiteResult]:
    return lambda rows, rules: search(rows, rules, tmp_path)


def test_methods_without_search_take_no_offset(offsets: Callable[..., SiteResult]) -> None:
    for fields in ({"method": "minmax"}, {"method": "smoothquant"}):
        result = offsets(gelu(), Recipe.model_validate({**fields, "inputs": {"unsigned": True}}))
        assert result.input is not None
        assert result.input.offset is None
        assert result.bias == {}


def test_the_plan_counts_what_is_clipped_after_the_offset(tmp_path: Path) -> None:
    rows = torch.randn(600, CHANNELS, generator=torch.Generator().manual_seed(0)) + 50
    plan = search(rows, recipe({"offset": "mean", "shift": False}), tmp_path).input
    assert plan is not None
    assert plan.offset is not None
    assert plan.clipped is not None
    beyond = (rows - plan.offset).abs() > 1.5 * plan.scale * plan.spec.format.max_level
    assert float(beyond.float().mean()) <= plan.clipped < 0.2


@pytest.mark.parametrize("tokens", [20, 600])  # few are scored by their outputs, many by Gram matrices
def test_the_error_of_an_input_with_an_offset_is_relative_to_the_float_outputs(tmp_path: Path, tokens: int) -> None:
    rows = biased()[:tokens]
    result = search(rows, recipe({"offset": "mean"}), tmp_path)
    assert result.input is not None
    assert result.input.offset is not None
    assert result.input.error == pytest.approx(output_error(rows, result), rel=0.02)


@pytest.mark.parametrize("blocks", [False, True])
def test_a_bias_takes_over_the_mean_of_what_earlier_layers_did(tmp_path: Path, blocks: bool) -> None:
    """What arrives lies off what the float model had by a constant, which only a bias can make up for."""
    arrived, drift = biased(), torch.randn(CHANNELS, generator=torch.Generator().manual_seed(5))
    had = TokenStore(tmp_path / "float.rows", CHANNELS)
    had.append(arrived + drift)
    named, block = weights(), {"granularity": "per_block", "formats": ["e2m1"]}
    lost = {}
    for correct in (False, True):
        rules = Recipe.model_validate({
            "weights": block if blocks else {}, "inputs": {**block, "shift": False, "sinks": "static"} if blocks else {"sinks": "static"},
            "search": {"rounds": 1, "compensation": "gptaq", "inherited": 1.0, "bias_correction": correct},
        })  # fmt: skip
        result = search_site(
            "site", named, statistics(arrived, tmp_path), {n: rules.rule(n) for n in named}, rules, wanted=FloatRows(had)
        )
        plan = result.input
        assert plan is not None
        q = fake_quantize_input(arrived if plan.offset is None else arrived - plan.offset, plan.spec, plan.scale, plan.shift, None)
        off = torch.cat([
            q @ result.rounded[n].t() + result.bias.get(n, torch.zeros(len(w))) - (arrived + drift) @ w.t() for n, w in named.items()
        ], 1)  # fmt: skip
        lost[correct] = float(off.square().mean()), float(off.mean(0).square().mean())
    assert lost[True][1] < 1e-6
    assert lost[True][0] < lost[False][0]
