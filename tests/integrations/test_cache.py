"""A decoder's cache in codes: what it holds, what generation does to it, and the models and caches it is refused for."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import llm_fp4
from llm_fp4 import api
from llm_fp4.errors import CheckpointError, UnsupportedError
from llm_fp4.integrations.cache import FLUSH, PackedLayer, cache_bytes
from llm_fp4.integrations.decoder import Decoder
from llm_fp4.models import continued
from llm_fp4.nn import CACHE, CacheCodes
from llm_fp4.numerics import fake_quantize, parse
from llm_fp4.plan import CachePlan, CacheSpec
from llm_fp4.recipe import Recipe

IDS = torch.randint(3, 260, (3, 80), generator=torch.Generator().manual_seed(1))


def recipe(bits: int = 4, **cache: Any) -> Recipe:
    data = {"search": {"rounds": 1}, "bits": {"activation": 16}, "cache": {"bits": bits, "window": 8, "sinks": 2, **cache}}
    return Recipe.model_validate(data)


def layer(window: int = 5, sinks: int = 2) -> PackedLayer:
    spec = CacheSpec(parse("e2m1"), parse("e1m2"), 2, 6, 4, window, sinks)
    scale = torch.linspace(0.1, 0.4, 12).view(2, 1, 6)
    return PackedLayer(CacheCodes.from_plan(CachePlan(spec, scale, torch.ones(2, 1, 1), (0.0, 0.0), 0.0)))


def states(tokens: int = 60, items: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(items, 2, tokens, 6, generator=generator), torch.randn(items, 2, tokens, 4, generator=generator)


def fed(pieces: list[int], **rules: int) -> tuple[PackedLayer, Tensor, Tensor]:
    """Return a layer and what it returned at the last of ``pieces``."""
    made, (keys, values) = layer(**rules), states(sum(pieces))
    for k, v in zip(keys.split(pieces, 2), values.split(pieces, 2), strict=True):
        found = made.update(k, v)
    return made, *found


@pytest.mark.parametrize("pieces", [[1] * 60, [30, 7, 23], [60], [3, 56, 1]])
def test_the_first_and_the_newest_tokens_are_float_the_others_rounded(pieces: list[int]) -> None:
    made, *_ = fed(pieces)
    keys, values = states()
    coded = made.key_codes.shape[2]
    got_keys, got_values = made.update(keys[:, :, :1], values[:, :, :1])
    assert made.get_seq_length() == 61
    assert 5 <= 60 - 2 - coded < 5 + FLUSH
    rounded = fake_quantize(keys, made.codes.key_scale, made.codes.spec.key)
    packed, step = made.codes.encode_values(values)
    near = made.codes.decode_values(packed, step, torch.float32)
    for got, exact, held in ((got_keys, keys, rounded), (got_values, values, near)):
        assert torch.equal(got[:, :, :2], exact[:, :, :2])
        assert torch.equal(got[:, :, 2 : 2 + coded], held[:, :, 2 : 2 + coded])
        assert torch.equal(got[:, :, 2 + coded : 60], exact[:, :, 2 + coded :])
        assert not torch.equal(exact[:, :, 2 : 2 + coded], held[:, :, 2 : 2 + coded])


def test_a_call_reads_its_own_tokens_in_float() -> None:
    _, keys, _ = fed([40])
    assert torch.equal(keys, states(40)[0])


def test_reordering_selecting_and_repeating_are_those_of_the_sequences() -> None:
    keys, values = states(40, 3)
    for change, index in (
        (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        made, plain = layer(), layer()
        made.update(keys, values)
        change(made)
        plain.update(keys[index], values[index])
        more = states(1, len(index))
        assert all(torch.equal(a, b) for a, b in zip(made.update(*more), plain.update(*more), strict=True))


@pytest.mark.parametrize("left", [39, 30, 12, 1, 0])
def test_cropping_forgets_the_newest_tokens(left: int) -> None:
    keys, values = states(40)
    made = layer()
    made.update(keys, values)
    held = made.update(keys[:, :, :0], values[:, :, :0])[0]
    made.crop(left - 40)
    assert made.get_seq_length() == left
    assert torch.equal(made.update(keys[:, :, :1], values[:, :, :1])[0][:, :, :left], held[:, :, :left])
    made.reset()
    assert made.get_seq_length() == made.nbytes == 0


def test_disk_equals_memory_and_codes_are_small(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "float")
    out = llm_fp4.quantize(tmp_path / "float", tmp_path / "out", recipe(), tokens=IDS)
    model, memory = llm_fp4.load(out), llm_fp4.quantize_module(tiny_llama(), [IDS], recipe())
    caches: list[Any] = [None, None]
    with torch.no_grad():
        for piece in IDS.split(16, 1):
            (ours, caches[0]), (expected, caches[1]) = (
                continued(m, piece, c) for m, c in zip((model, memory), caches, strict=True)
            )
            assert torch.allclose(ours, expected, atol=1e-5)
    assert all(isinstance(each, PackedLayer) for each in caches[0].layers)
    # two layers, three sequences, two heads, keys and values of 8 channels: of 80 tokens 70 in codes, and a value's step
    assert cache_bytes(caches[0]) == 2 * 3 * 2 * (70 * (4 + 4 + 2) + 10 * 2 * 8 * 4)
    report = llm_fp4.inspect_model(out).cache
    assert [r.name for r in report] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert all(e is not None and 0 < e < 0.2 for r in report for e in r.errors)
    assert report[0].ratio == pytest.approx(32 / 10)
    assert not any(isinstance(m, CacheCodes) for m in llm_fp4.quantize_module(tiny_llama(), [IDS], recipe(16)).modules())


def test_more_bits_are_closer_to_a_float_cache(tiny_llama: Callable[..., Any]) -> None:
    off = []
    for bits in (4, 6, 8):
        model = llm_fp4.quantize_module(tiny_llama(), [IDS], recipe(bits))
        with torch.no_grad():
            expected, cache, steps = model(IDS).logits, None, []
            for piece in IDS.split(1, 1):
                logits, cache = continued(model, piece, cache)
                steps.append(logits)
        off.append(float((torch.cat(steps, 1) - expected).norm() / expected.norm()))
    assert off[0] > 2 * off[1] > 4 * off[2] > 0
    assert off[2] < 0.05


def test_generation_uses_it_and_a_wide_window_changes_nothing(tiny_llama: Callable[..., Any]) -> None:
    rules = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    wide = llm_fp4.quantize_module(tiny_llama(), [IDS], recipe(window=100))
    narrow = llm_fp4.quantize_module(tiny_llama(), [IDS], recipe(3))
    assert torch.equal(wide.generate(IDS, **rules), wide.generate(IDS, use_cache=False, **rules))
    assert not torch.equal(narrow.generate(IDS, **rules), narrow.generate(IDS, use_cache=False, **rules))
    padded = torch.cat((torch.zeros(1, 6, dtype=torch.long), IDS[:1, :20]), 1)
    both = torch.cat((padded, IDS[1:2, :26]))
    mask = torch.ones_like(both)
    mask[0, :6] = 0
    together = wide.generate(both, attention_mask=mask, **rules)
    assert torch.equal(together[:1, 26:], wide.generate(IDS[:1, :20], **rules)[:, 20:])
    assert narrow.generate(both, attention_mask=mask, **rules).shape == (2, 66)


def test_beams_are_those_of_a_cache_that_is_computed_anew(tiny_llama: Callable[..., Any]) -> None:
    model = llm_fp4.quantize_module(tiny_llama(), [IDS], recipe(window=100))
    rules = {"max_new_tokens": 20, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(IDS, **rules), model.generate(IDS, use_cache=False, **rules))
    coarse = llm_fp4.quantize_module(tiny_llama(), [IDS], recipe(8))
    assert coarse.generate(IDS, **rules).shape == (3, 100)


def test_other_caches_are_refused_and_a_filled_one_is_taken_over(tiny_llama: Callable[..., Any]) -> None:
    model = llm_fp4.quantize_module(tiny_llama(), [IDS], recipe(8))
    with pytest.raises(UnsupportedError, match=r"model.layers.0.self_attn keeps .* StaticLayer cannot hold"):
        model.generate(IDS, max_new_tokens=2, cache_implementation="static", pad_token_id=0)
    plain = tiny_llama()
    cache: Any = transformers.DynamicCache()
    with torch.no_grad():
        _, cache = continued(plain, IDS[:, :40], cache)
        assert type(cache.layers[0]) is transformers.cache_utils.DynamicLayer
        _, cache = continued(model, IDS[:, 40:41], cache)
    assert isinstance(cache.layers[1], PackedLayer)
    assert cache.get_seq_length() == 41
    with pytest.raises(UnsupportedError, match="kept in codes"):
        Decoder(model)


def test_a_cache_alone_leaves_the_model_in_float(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "float")
    floats = {"embedding": 16, "weight": 16, "activation": 16}
    rules = Recipe.model_validate({"bits": floats, "cache": {"bits": 8, "window": 8}})
    model = llm_fp4.load(llm_fp4.quantize(tmp_path / "float", tmp_path / "out", rules, tokens=IDS))
    with torch.no_grad():
        expected = tiny_llama(tie_word_embeddings=True)(IDS).logits
        assert torch.allclose(model(IDS).logits, expected, atol=1e-5)
        _, cache = continued(model, IDS, None)
    assert all(isinstance(each, PackedLayer) for each in cache.layers)


def test_a_copied_model_keeps_codes_too(tiny_llama: Callable[..., Any]) -> None:
    model = copy.deepcopy(llm_fp4.quantize_module(tiny_llama(), [IDS], recipe()))
    with torch.no_grad():
        _, cache = continued(model, IDS, None)
    assert isinstance(cache.layers[0], PackedLayer)


def test_sliding_windows_are_left_in_float_or_refused() -> None:
    sizes = {
        "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    mistral = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes, sliding_window=16)).eval()
    with pytest.raises(UnsupportedError, match=r"every layer of MistralForCausalLM keeps a sliding window"):
        llm_fp4.quantize_module(mistral, [IDS], recipe())
    kinds = ["sliding_attention", "full_attention"]
    gemma = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes, sliding_window=16, layer_types=kinds)).eval()
    model = llm_fp4.quantize_module(gemma, [IDS], recipe())
    assert [n for n, m in model.named_modules() if CACHE in m._modules] == ["model.layers.1.self_attn"]
    assert model.generate(IDS, max_new_tokens=30, do_sample=False, pad_token_id=0).shape == (3, 110)


def test_damaged_scales_and_exports_are_named(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "float")
    out = llm_fp4.quantize(tmp_path / "float", tmp_path / "out", recipe(), tokens=IDS)
    with pytest.raises(UnsupportedError, match="gguf cannot hold keys and values in codes"):
        api.export(out, tmp_path / "exported", "gguf")
    config = json.loads((out / "config.json").read_text())
    entry = config["quantization_config"]["cache"]["model.layers.1.self_attn"]
    entry["heads"] = 4
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"key_scale is \(2, 1, 8\).*damaged"):
        llm_fp4.load(out)
    del entry["heads"]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="a cache of keys and values that cannot be read"):
        llm_fp4.load(out)
