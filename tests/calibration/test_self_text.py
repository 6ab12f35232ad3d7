"""Text the model writes itself: shape, determinism, distribution, and no trace left on the model or the random state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llm_fp4.calibration import load_tokens, write_text
from llm_fp4.errors import CalibrationError


def test_full_length_from_bos_without_special_tokens(tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> None:
    text = load_tokens("self", tiny_tokenizer, sequences=6, length=20, seed=3, model=tiny_llama())
    assert text.shape == (6, 20)
    assert text.dtype == torch.int64
    assert text[:, 0].tolist() == [0] * 6
    rest = text[:, 1:]
    assert int(rest.min()) >= 2  # neither "<s>" nor "</s>"
    assert int(rest.max()) < len(tiny_tokenizer)  # nor a row of the embedding that no token uses
    assert len(text[:, 1].unique()) > 1  # a random second token


def test_special_tokens_are_forbidden_even_where_likeliest(tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_llama()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(260))
    with torch.no_grad():
        model.lm_head.bias[:2] = 1e4
        model.lm_head.bias[258:] = 1e4
    text = write_text(model, tiny_tokenizer, sequences=2, length=30, seed=0)
    assert int(text[:, 1:].min()) >= 2
    assert int(text.max()) < 258


def test_the_same_seed_gives_the_same_text_and_another_another(tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_llama()
    state = torch.random.get_rng_state()
    first = write_text(model, tiny_tokenizer, sequences=4, length=16, seed=5, batch=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(first, write_text(model, tiny_tokenizer, sequences=4, length=16, seed=5, batch=3))
    assert not torch.equal(first, write_text(model, tiny_tokenizer, sequences=4, length=16, seed=6, batch=3))


def test_tokens_follow_the_models_own_distribution(tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> None:
    """A model that ignores its input and gives token t weight t: frequencies must be within sampling error of it."""
    model = tiny_llama()
    weight = torch.zeros(260)
    weight[2:258] = torch.arange(1, 257).float()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.lm_head.bias = torch.nn.Parameter(weight.log())
    model.generation_config.top_k = 3  # a shipped generation config must not narrow the text
    model.generation_config.temperature = 0.1
    model.generation_config.min_p = 0.5
    model.generation_config.repetition_penalty = 9.0
    drawn = write_text(model, tiny_tokenizer, sequences=32, length=130, seed=0)[:, 2:].flatten()
    counts = torch.bincount(drawn, minlength=260)[2:258].view(8, 32).sum(1).double()
    expected = weight[2:258].view(8, 32).sum(1).double()
    expected *= len(drawn) / expected.sum()
    assert float(((counts - expected) ** 2 / expected).sum()) < 24.3  # chi-squared, 7 degrees of freedom, p = 0.001
    assert model.generation_config.top_k == 3


def test_progress_counts_tokens_and_ends_at_the_total(tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> None:
    seen: list[tuple[str, int, int]] = []
    write_text(tiny_llama(), tiny_tokenizer, sequences=5, length=8, seed=0, batch=2, progress=lambda *report: seen.append(report))
    done = [report[1] for report in seen]
    assert done == sorted(done)
    assert len(set(done)) > 15
    assert seen[-1] == ("write calibration text", 40, 40)


def test_the_model_is_left_as_it_was(tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_llama().train()
    config = model.generation_config
    text = write_text(model, tiny_tokenizer, sequences=1, length=4, seed=0)
    assert model.training
    assert model.generation_config is config
    assert not text.is_inference()


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_shortest_texts(tiny_llama: Callable[..., Any], tiny_tokenizer: Any, length: int) -> None:
    assert write_text(tiny_llama(), tiny_tokenizer, sequences=3, length=length, seed=0).shape == (3, length)


def test_eos_or_nothing_begins_a_text_without_bos(tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> None:
    tiny_tokenizer.bos_token = None
    assert write_text(tiny_llama(), tiny_tokenizer, sequences=2, length=5, seed=0)[:, 0].tolist() == [1, 1]
    tiny_tokenizer.eos_token = None
    assert write_text(tiny_llama(), tiny_tokenizer, sequences=2, length=5, seed=0).shape == (2, 5)


def test_a_broken_model_and_one_that_cannot_write(tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(CalibrationError, match="NaN or infinite while it writes"):
        write_text(model, tiny_tokenizer, sequences=1, length=8, seed=0)
    with pytest.raises(CalibrationError, match=r"Linear cannot write its own calibration text; calibrate on a text file"):
        write_text(torch.nn.Linear(2, 2), tiny_tokenizer, sequences=1, length=8, seed=0)


def test_a_batch_holds_no_more_keys_and_values_than_its_budget(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = tiny_llama(), []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda start, **options: (rows.append(len(start)), generate(start, **options))[1])
    a_sequence = 2 * 2 * 2 * 8 * 4 * 10  # keys and values, layers, heads, head width, bytes of float32, tokens
    for budget, expected in [(1, [1] * 5), (3 * a_sequence, [3, 2]), (4 * a_sequence - 1, [3, 2]), (1 << 30, [5])]:
        rows.clear()
        monkeypatch.setattr("llm_fp4.calibration.self_text.CACHE_BYTES", budget)
        write_text(model, tiny_tokenizer, sequences=5, length=10, seed=0)
        assert rows == expected
