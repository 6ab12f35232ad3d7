"""Caches in codes of encoder-decoders and other families: what grows is held in codes, what an encoder gives stays in float."""

from __future__ import annotations

from pathlib import Path

import pytest

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
    inputs = {n: x for n, x in data.items() if n != "decoder_input_ids"}
    rules = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    written = model.generate(**inputs, **rules)
    cache = getattr(written, "cache", None) or written.past_key_values
    own = getattr(cache, "self_attention_cache", cache)
    assert all(isinstance(each, PackedLayer) and each.key_codes.shape[2] > 0 for each in own.layers)
    if left:
        assert not any(isinstance(each, PackedLayer) for each in cache.cross_attention_cache.layers)


def test_a_model_that_does_not_write_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="BertModel does not generate"):
        llm_fp4.quantize_module(build("BERT"), [batch("BERT")], RECIPE)
