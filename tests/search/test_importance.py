"""Weighted errors: importance enters every sum as it would enter a plain one, and moves what the search chooses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llm_fp4.errors import UnsupportedError
from llm_fp4.kernels.simulate import fake_quantize_input
from llm_fp4.numerics import fake_quantize, parse, scale_of_max
from llm_fp4.pipeline.importance import site_importance
from llm_fp4.plan import InputSpec
from llm_fp4.recipe import Bits, Recipe
from llm_fp4.search import search_site
from llm_fp4.search.inputs import OutputError
from llm_fp4.search.weights import output_loss
from llm_fp4.statistics import Importance, SiteStatistics, TokenStore

TOKENS, IN, OUT = 5000, 24, 20  # more than one chunk of tokens


def statistics(folder: Path, importance: Importance | None) -> SiteStatistics:
    torch.manual_seed(3)
    store = TokenStore(folder / f"rows-{importance is None}", IN)
    store.append(torch.randn(TOKENS, IN) * torch.exp(torch.randn(IN)))
    store.settle([TOKENS])
    return SiteStatistics("site", store, torch.device("cpu"), importance=importance)


def importance() -> Importance:
    torch.manual_seed(4)
    tokens, outputs = torch.exp(2 * torch.randn(TOKENS)), torch.exp(torch.randn(OUT))
    return Importance(tokens / tokens.mean(), {"w": outputs / outputs.mean()})


def weight() -> Tensor:
    torch.manual_seed(5)
    return torch.randn(OUT, IN) / 5


def rounded_input(rows: Tensor, site: SiteStatistics) -> Tensor:
    spec = InputSpec(parse("e2m1"))
    return fake_quantize_input(rows, spec, scale_of_max(site.channel_absmax.amax() / 4, spec.format), None, None)


def test_weighted_sums_are_the_plain_sum_over_tokens_and_outputs(tmp_path: Path) -> None:
    counts = importance()
    site, w = statistics(tmp_path, counts), weight()
    w_hat = fake_quantize(w, scale_of_max(w.abs().amax(1), parse("e2m1"))[:, None], parse("e2m1"))
    rows = site.tokens.rows
    error = rounded_input(rows, site).double() @ w_hat.double().t() - rows.double() @ w.double().t()
    expected = float((error.square() * counts.tokens.double()[:, None] * counts.outputs["w"].double()).sum())
    gram = site.quantized_gram(lambda x: rounded_input(x, site))
    assert output_loss(w, w_hat, gram, site.outputs("w")) == pytest.approx(expected, rel=1e-4)
    sample = OutputError(*site.sample(TOKENS), [w], [site.outputs("w")]).under([w_hat])
    assert float(sample(lambda x: rounded_input(x, site))) == pytest.approx(expected, rel=2e-2)  # ranked in bfloat16, perhaps


def test_a_smaller_sample_still_estimates_the_weighted_sum(tmp_path: Path) -> None:
    site, w = statistics(tmp_path, importance()), weight()
    whole, part = (OutputError(*site.sample(n), [w]) for n in (TOKENS, 2000))
    found, expected = (float(e(lambda x: rounded_input(x, site))) for e in (part, whole))
    assert found == pytest.approx(expected, rel=0.1)


def test_the_search_serves_the_tokens_that_count(tmp_path: Path) -> None:
    large = torch.zeros(TOKENS)
    large[: TOKENS // 10] = 1.0
    recipe = Recipe(bits=Bits(embedding=16), inputs={"sinks": "static"})

    def error_where_it_counts(counts: Importance | None) -> float:
        torch.manual_seed(3)
        store = TokenStore(tmp_path / "rows", IN)
        store.append(torch.randn(TOKENS, IN) * (1.0 + 30.0 * (1 - large)).unsqueeze(1))  # the small tokens count
        site = SiteStatistics("site", store, torch.device("cpu"), importance=counts)
        result = search_site("site", {"w": weight()}, site, {"w": recipe.rule("w")}, recipe)
        assert result.input is not None
        rows = store.rows[: TOKENS // 10]
        x = fake_quantize_input(rows, result.input.spec, result.input.scale, result.input.shift, None)
        w_hat = fake_quantize(weight(), result.weights["w"].scale[:, None], result.weights["w"].format)
        return float((x @ w_hat.t() - rows @ weight().t()).square().sum())

    counts = Importance(large / large.mean(), {"w": torch.ones(OUT)})
    assert error_where_it_counts(counts) < 0.2 * error_where_it_counts(None)


def test_the_squared_gradients_of_operands_become_one_factor_a_token_and_one_an_output() -> None:
    weights = {"q": torch.zeros(6, 4), "k": torch.zeros(2, 4)}
    gradients = {
        "q.tokens": torch.tensor([1.0, 3.0]), "q.outputs": torch.full((6,), 2.0),
        "k.tokens": torch.tensor([4.0, 0.0]), "k.outputs": torch.tensor([0.0, 4.0]),
    }  # fmt: skip
    found = site_importance(gradients, weights, 2)
    assert found is not None
    torch.testing.assert_close(found.tokens, torch.tensor([14.0, 18.0]) / 16)  # 6 outputs of q and 2 of k a token
    torch.testing.assert_close(found.outputs["q"], torch.ones(6))
    assert found.outputs["k"].tolist() == [pytest.approx(1e-3), 2.0]


def test_a_site_that_no_gradient_reaches_counts_plainly_and_one_of_other_tokens_is_refused() -> None:
    weights = {"q": torch.zeros(6, 4)}
    assert site_importance({}, weights, 2) is None
    assert site_importance({"q.tokens": torch.zeros(2), "q.outputs": torch.zeros(6)}, weights, 2) is None
    with pytest.raises(UnsupportedError, match=r"q read 3 tokens.*--objective output"):
        site_importance({"q.tokens": torch.ones(2), "q.outputs": torch.ones(6)}, weights, 3)
