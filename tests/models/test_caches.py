"""Caches in codes of encoder-decoders and other families: what grows is held in codes, what an encoder gives stays in float."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import llm_fp4
from llm_fp4.errors import UnsupportedError
from llm_fp4.integrations.cache import PackedLayer
from llm_fp4.recipe import Recipe

from .families import batch, build

RECIPE = Recipe.model_validate({"search": {"rounds": 1}, "bits": {"activation": 16}, "cache": {"bits": 8, "window": 2, "sinks": 2}})


@pytest.mark.parametrize("family", ["Whisper", "T5", "BART", "GPT-2", "OPT"])
def test_what_reads_an_encoder_stays_in_float_and_says_so(family: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path / "float")
    data = batch(family)
    out = llm_fp4.quantize(tmp_path / "float", tmp_path / "out", RECIPE, batches=[data])
    model = llm_fp4.load(out)
    report = llm_fp4.inspect_model(out).cache
    held, left = [r for r in report if r.ratio], [r for r in report if not r.ratio]
    assert len(held) == 2
    assert len(left) == (4 if family in ("Whisper", "T5", "BART") else 0)
    assert all("an encoder" in r.reason for r in left)
    ids = data["input_ids"] if "input_ids" in data else data["decoder_input_ids"]
    inputs = {n: x for n, x in data.items() if n not in ("decoder_input_ids", "attention_mask")}
    inputs["decoder_input_ids" if left else "input_ids"] = ids
    if left and "input_ids" in data:
        inputs["input_ids"] = ids
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        out = model(**inputs, use_cache=True)
    assert torch.allclose(out.logits, expected, atol=1e-4)  # a call reads its own tokens in float
    cache = getattr(out, "cache", None) or out.past_key_values
    own = getattr(cache, "self_attention_cache", cache)
    assert all(isinstance(each, PackedLayer) and each.key_codes.shape[2] == ids.shape[1] - 4 for each in own.layers)
    if left:
        assert not any(isinstance(each, PackedLayer) for each in cache.cross_attention_cache.layers)
    rest = {n: x for n, x in inputs.items() if n != "decoder_input_ids"}
    assert model.generate(**rest, max_new_tokens=6, pad_token_id=0).shape[1] > 1


def test_a_model_that_does_not_write_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="BertModel does not generate"):
        llm_fp4.quantize_module(build("BERT"), [batch("BERT")], RECIPE)
