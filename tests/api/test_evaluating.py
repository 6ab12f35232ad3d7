"""The calls that stand behind ``eval``, ``generate`` and ``inspect``, from Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_fp4
from llm_fp4.api import answer_questions, generate_text, load_any
from llm_fp4.errors import CalibrationError, RecipeError, UnsupportedError
from llm_fp4.evaluation import compare, windows
from llm_fp4.models import open_model
from llm_fp4.recipe import Recipe


@pytest.fixture
def source(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> Path:
    folder = tmp_path / "model"
    tiny_llama(tie_word_embeddings=True).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("All the sailors sang of the wide sea. " * 30)
    return path


def test_evaluate_takes_paths_modules_and_tokens(source: Path, text: Path, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    tokens = torch.tensor(tiny_tokenizer(text.read_text())["input_ids"])
    expected = compare(None, {"model": model}, windows(tokens, 32)[:4])["model"]
    for named, given in ((source, text), (model, text), (model, tokens), (source, tokens[:128])):
        found = llm_fp4.evaluate(named, text=given, length=32, windows=4, tokenizer=tiny_tokenizer)
        assert set(found) == {"model"}
        assert found["model"].tokens == 4 * 31
        assert found["model"].perplexity == pytest.approx(expected.perplexity, rel=1e-5)
    other = llm_fp4.evaluate(
        tiny_llama(seed=1), text=text, reference=source, length=32, windows=2
    )  # read by the reference's tokenizer
    assert set(other) == {"float", "model"}
    assert other["model"].kl is not None
    assert other["model"].kl > 0.1


def test_evaluate_refuses_what_the_model_cannot_take(source: Path, text: Path, tiny_llama: Any) -> None:
    with pytest.raises(CalibrationError, match="has no tokenizer"):
        llm_fp4.evaluate(tiny_llama(), text=text)
    with pytest.raises(CalibrationError, match="knows only 260"):
        llm_fp4.evaluate(source, text=torch.full((64,), 300), length=32)
    with pytest.raises(CalibrationError, match="at most 256 tokens"):
        llm_fp4.evaluate(source, text=text, length=300)


def test_a_tied_head_is_loaded_once(source: Path) -> None:
    model = load_any(source).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert open_model(str(source)).bytes_float == sum(p.numel() * 4 for p in model.parameters())


def test_the_float_model_keeps_its_generation_settings(source: Path, text: Path, tmp_path: Path) -> None:
    settings = source / "generation_config.json"
    settings.write_text(
        json.dumps({"temperature": 0.6, "do_sample": False, "eos_token_id": [1, 7]})
    )  # what newer versions warn about
    assert load_any(source).model.generation_config.eos_token_id == [1, 7]
    recipe = Recipe.model_validate({"calibration": {"source": str(text), "sequences": 1, "length": 32}, "search": {"rounds": 1}})
    out = llm_fp4.quantize(source, tmp_path / "out", recipe)
    assert (out / settings.name).read_bytes() == settings.read_bytes()
    assert llm_fp4.inspect_model(out).float_bytes == open_model(str(source)).bytes_float


def test_text_comes_in_pieces_that_make_the_whole(source: Path) -> None:
    pieces: list[str] = []
    text = generate_text(source, "The sea", max_new_tokens=240, temperature=5.0, seed=3, on_text=pieces.append)
    assert len(pieces) > 1
    assert "".join(pieces) == text
    state = torch.get_rng_state()
    assert generate_text(source, "The sea", max_new_tokens=240, temperature=5.0, seed=3) == text
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_does_not_generate_is_refused(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    loaded = load_any_module(tiny_llama().model, tiny_tokenizer)
    with pytest.raises(UnsupportedError, match="does not generate"):
        generate_text(loaded, "The sea")


def load_any_module(model: Any, tokenizer: Any) -> Any:
    from llm_fp4.api import Loaded

    return Loaded(model, tokenizer, False, "a model without a head")


def test_questions_of_several_files(source: Path, tmp_path: Path) -> None:
    for name, gold in (("right", 0), ("wrong", 1)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"query": "Is it?", "choices": ["yes", "no"], "gold": gold}))
    found = answer_questions(source, [tmp_path / "right.jsonl", tmp_path / "wrong.jsonl"])
    assert found["right"].acc + found["wrong"].acc == 1


def test_inspect_refuses_a_recipe_that_does_not_fit(source: Path) -> None:
    with pytest.raises(RecipeError, match="matches no module"):
        llm_fp4.inspect_model(source, Recipe(ignore=["nothing"]))
    layers = {layer.name: layer for layer in llm_fp4.inspect_model(source).layers}
    assert layers["lm_head"].reason == "shares the codes of model.embed_tokens"
