"""Perplexity at several lengths, through the cache or as a whole, and the sentence on static scales that no longer fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_fp4
from llm_fp4.api import evaluate, evaluate_contexts
from llm_fp4.errors import CalibrationError
from llm_fp4.evaluation import Clipped, clipping_sentence, compare, watch_clipping
from llm_fp4.nn import QuantLinear
from llm_fp4.recipe import Recipe

TEXT = torch.randint(2, 258, (160,), generator=torch.Generator().manual_seed(0))
CALIBRATION = torch.randint(2, 258, (4, 40), generator=torch.Generator().manual_seed(1))
STATIC = {"search": {"rounds": 1}, "inputs": {"sinks": "static"}}


def test_pieces_give_what_the_whole_gives(tiny_llama: Callable[..., Any]) -> None:
    reference, model = tiny_llama(), tiny_llama(seed=1)
    whole = compare(reference, {"other": model}, TEXT.view(2, 80))
    for chunk in (1, 7, 79, 80, 200):
        found = compare(reference, {"other": model}, TEXT.view(2, 80), chunk=chunk)
        for name in whole:
            assert found[name].tokens == whole[name].tokens == 158
            assert found[name].perplexity == pytest.approx(whole[name].perplexity, rel=1e-4)
            assert found[name].kl == pytest.approx(whole[name].kl, rel=1e-3, abs=1e-6)


def test_contexts_cut_the_same_tokens(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    found = evaluate_contexts(model, [20, 40, 80], text=TEXT, windows=2, reference=tiny_llama(seed=1))
    assert [m["model"].tokens for m in found.values()] == [152, 156, 158]
    assert found[40]["model"].perplexity == pytest.approx(evaluate(model, text=TEXT, length=40)["model"].perplexity, rel=1e-4)
    assert found[40]["float"].kl == 0
    with pytest.raises(CalibrationError, match="takes at most 256 tokens"):
        evaluate_contexts(model, [20, 300], text=TEXT.repeat(2))
    with pytest.raises(CalibrationError, match="not one window of 200"):
        evaluate_contexts(model, [20, 200], text=TEXT)


def test_a_cache_in_codes_is_read_back_when_measured(tiny_llama: Callable[..., Any]) -> None:
    rules = {"search": {"rounds": 1}, "bits": {"activation": 16}, "cache": {"bits": 3, "window": 0, "sinks": 0}}
    model = llm_fp4.quantize_module(tiny_llama(), [CALIBRATION], Recipe.model_validate(rules))
    through = evaluate(model, text=TEXT, length=80)["model"].perplexity
    assert through != pytest.approx(evaluate(model, text=TEXT, length=80, chunk=80)["model"].perplexity, rel=1e-3)
    assert through == evaluate_contexts(model, [80], text=TEXT, windows=2)[80]["model"].perplexity


def test_what_a_static_scale_clips_is_counted(tiny_llama: Callable[..., Any]) -> None:
    model = llm_fp4.quantize_module(tiny_llama(), [CALIBRATION], Recipe.model_validate(STATIC))
    with torch.no_grad(), watch_clipping(model, {}) as found:
        model(CALIBRATION)
    names = {c.name for c in found}
    assert "model.layers.0.self_attn.q_proj" in names
    assert "model.layers.0.self_attn.k_proj" not in names  # the same tensor
    clipped = next(c for c in found if c.name == "model.layers.0.mlp.down_proj")
    layer = model.model.layers[0].mlp.down_proj
    assert isinstance(layer, QuantLinear)
    seen = []
    with layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])), torch.no_grad():
        model(CALIBRATION)
    steps = layer.input_scale / torch.exp2(layer.input_shift.float()) if layer.input_shift is not None else layer.input_scale
    assert clipped.values == seen[0].numel()
    assert clipped.share == pytest.approx(float((seen[0].abs() > steps * layer.spec.format.max_level).float().mean()), abs=1e-6)


def test_the_plan_knows_what_calibration_clipped_and_more_is_said(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "float")
    out = llm_fp4.quantize(tmp_path / "float", tmp_path / "out", Recipe.model_validate(STATIC), tokens=CALIBRATION)
    plan = json.loads((out / "plan.json").read_text())
    shares = [site["clipped"] for site in plan["inputs"].values()]
    assert all(0 <= share < 0.2 for share in shares)
    said: list[str] = []
    evaluate(out, text=CALIBRATION.flatten(), length=40, warn=said.append)
    assert said == []
    for site in plan["inputs"].values():
        site["clipped"] = 0.0
    (out / "plan.json").write_text(json.dumps(plan))
    evaluate(out, text=TEXT, length=40, warn=said.append)
    assert len(said) == 1
    assert "at 40 tokens the static scales of" in said[0]
    assert "granularity: per_token" in said[0]


def test_scales_made_for_each_token_clip_nothing_that_counts(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    rules = Recipe.model_validate({"search": {"rounds": 1}, "inputs": {"granularity": "per_token"}})
    model = llm_fp4.quantize_module(tiny_llama(), [CALIBRATION], rules)
    with torch.no_grad(), watch_clipping(model, {}) as found:
        model(CALIBRATION)
    assert found == []


def test_the_sentence_names_the_worst_and_what_helps() -> None:
    fine = Clipped("a", False, 10_000, 0.01, 0.009)
    unknown = Clipped("b", False, 10_000, 0.5, None)
    far = Clipped("c", False, 10_000, 0.2, 0.01)
    keys = Clipped("d", True, 10_000, 0.4, 0.05)
    assert clipping_sentence([fine, unknown], 8192) is None
    assert "2 of 4 tensors" in str(clipping_sentence([fine, unknown, far, keys], 8192))
    assert "worst: c, 20.00% against 1.00%" in str(clipping_sentence([fine, far, keys], 8192))
    assert "longer sequences" in str(clipping_sentence([fine, keys], 8192))
