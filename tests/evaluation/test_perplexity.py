"""Metrics against a computation written out plainly, and what must hold of any divergence."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm_fp4.errors import CalibrationError, NonFiniteError, UnsupportedError
from llm_fp4.evaluation import Metrics, compare, windows

TEXT = torch.randint(2, 258, (3, 70), generator=torch.Generator().manual_seed(0))  # more than one chunk of tokens


def disturbed(model: nn.Module, by: float) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += by * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return other


def by_hand(reference: Any, model: Any, text: Tensor) -> Metrics:
    """All windows at once, in float64, token by token."""
    with torch.no_grad():
        p = torch.softmax(reference(input_ids=text).logits[:, :-1].double(), -1).flatten(0, 1)
        q = torch.softmax(model(input_ids=text).logits[:, :-1].double(), -1).flatten(0, 1)
    following = text[:, 1:].flatten()
    loss = kl = agree = 0.0
    for token in range(len(following)):
        loss -= math.log(q[token, following[token]])
        kl += sum(a * math.log(a / b) for a, b in zip(p[token].tolist(), q[token].tolist(), strict=True))
        agree += int(p[token].argmax()) == int(q[token].argmax())
    count = len(following)
    return Metrics(math.exp(loss / count), kl / count, agree / count, count)


def test_compare_agrees_with_a_plain_computation(tiny_llama: Callable[..., Any]) -> None:
    reference = tiny_llama()
    others = {"near": disturbed(reference, 0.02), "far": tiny_llama(seed=1)}
    found = compare(reference, others, TEXT)
    assert list(found) == ["float", "near", "far"]
    for name, model in {"float": reference, **others}.items():
        expected = by_hand(reference, model, TEXT)
        assert found[name].perplexity == pytest.approx(expected.perplexity, rel=1e-5)
        assert found[name].kl == pytest.approx(expected.kl, rel=1e-4, abs=1e-12)
        assert found[name].top1 == expected.top1
        assert found[name].tokens == expected.tokens == 3 * 69
    assert 0 < found["near"].kl < found["far"].kl
    assert 1 > found["near"].top1 > found["far"].top1


def test_an_identical_model_does_not_diverge(tiny_llama: Callable[..., Any]) -> None:
    reference = tiny_llama()
    found = compare(reference, {"same": copy.deepcopy(reference)}, TEXT)
    assert found["same"] == found["float"]
    assert found["same"].kl == 0
    assert found["same"].top1 == 1


class Fixed(nn.Module):
    """A model that gives the same float64 logits whatever it reads."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits)


@pytest.mark.parametrize("seed", range(8))
def test_divergence_is_never_negative_where_only_rounding_tells_models_apart(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, noise = (torch.randn(1, 40, 260, generator=generator, dtype=torch.float64) for _ in range(2))
    found = compare(Fixed(p), {"near": Fixed(p + 1e-15 * noise)}, TEXT[:1, :40])["near"]
    assert found.kl is not None
    assert 0 <= found.kl < 1e-14


def test_without_a_reference_only_perplexity(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    found = compare(None, {"float": model}, TEXT)["float"]
    assert (found.kl, found.top1) == (None, None)
    assert found.perplexity == compare(model, {}, TEXT)["float"].perplexity


def test_perplexity_is_that_of_the_models_own_loss(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    with torch.no_grad():
        loss = float(model(input_ids=TEXT, labels=TEXT).loss)
    assert compare(None, {"m": model}, TEXT)["m"].perplexity == pytest.approx(math.exp(loss), rel=1e-5)


def test_a_hopeless_model_has_a_perplexity_of_infinity(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    model.lm_head.bias = nn.Parameter(torch.zeros(260).index_fill(0, torch.tensor(259), 1e6))
    assert compare(tiny_llama(), {"hopeless": model}, TEXT)["hopeless"].perplexity == math.inf


def test_broken_logits_name_the_model_and_the_window(tiny_llama: Callable[..., Any]) -> None:
    broken = tiny_llama()
    with torch.no_grad():
        broken.model.embed_tokens.weight[int(TEXT[1, 5])] = float("nan")
    text = torch.where(TEXT.eq(TEXT[1, 5]), 3, TEXT)
    text[1, 5] = TEXT[1, 5]
    with pytest.raises(NonFiniteError, match=r"model 'broken' gives .* NaN or infinite in window 2 of 3"):
        compare(tiny_llama(), {"fine": tiny_llama(), "broken": broken}, text)


def test_another_vocabulary_and_a_taken_name_are_refused(tiny_llama: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedError, match=r"'wide' has a vocabulary of 300, the reference one of 260"):
        compare(tiny_llama(), {"wide": tiny_llama(vocab_size=300)}, TEXT)
    with pytest.raises(UnsupportedError, match="named 'float'"):
        compare(tiny_llama(), {"float": tiny_llama()}, TEXT)


def test_models_are_left_as_they_were_and_progress_is_told(tiny_llama: Callable[..., Any]) -> None:
    reference, model = tiny_llama().train(), tiny_llama(seed=1, attention_dropout=0.5)
    model.train()
    seen: list[tuple[str, int, int]] = []
    found = compare(reference, {"m": model}, TEXT, lambda *report: seen.append(report))
    assert reference.training
    assert model.training
    assert seen == [("perplexity", done, 6) for done in range(1, 7)]
    assert found == compare(reference.eval(), {"m": model.eval()}, TEXT)  # dropout was off


def test_windows_are_consecutive() -> None:
    assert windows(torch.arange(11), 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    with pytest.raises(CalibrationError, match="holds 5 tokens, not one window of 6"):
        windows(torch.arange(5), 6)
    with pytest.raises(CalibrationError, match="predicts no token"):
        windows(torch.arange(5), 1)
