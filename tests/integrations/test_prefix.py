"""The prefix that takes the part of the attention sink: what a model with it computes, keeps, loads and refuses."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import llm_fp4
from llm_fp4 import api
from llm_fp4.checkpoint import RunStore
from llm_fp4.cli.prefix import prefix_line
from llm_fp4.errors import CheckpointError, RecipeError, UnsupportedError
from llm_fp4.integrations.attention import fused_attention, quantized_attention, use_prefixed_attention
from llm_fp4.integrations.decoder import Decoder
from llm_fp4.kernels.compiled import available
from llm_fp4.models import continued, find_structure
from llm_fp4.nn import PREFIX, AttentionPrefix
from llm_fp4.pipeline.choosing import Trial
from llm_fp4.pipeline.prefix import PrefixRun
from llm_fp4.recipe import Recipe

SINK = 3
IDS = torch.randint(4, 260, (3, 24), generator=torch.Generator().manual_seed(1))
IDS[:, 0] = SINK
TOKENS = [7, 0]


def recipe(**fields: Any) -> Recipe:
    data = {"search": {"rounds": 1}, "bits": {"embedding": 16}, "ignore": ["lm_head", "self_attn.*"], **fields}
    return Recipe.model_validate({**data, "inputs": {"sinks": "prefix", **fields.get("inputs", {})}})


EVERYTHING: dict[str, Any] = {"bits": {"embedding": 4, "activation": 8}, "ignore": []}
BLOCKS = {"granularity": "per_block", "block_size": 16, "scale_dtype": "e4m3", "formats": ["e2m1"]}
IN_BLOCKS: dict[str, Any] = {"weights": BLOCKS, "search": {"compensation": "gptq"}}


@pytest.fixture
def sinking(tiny_llama: Callable[..., Any]) -> Callable[..., Any]:
    """Return a factory of models in which token 3 blows up two channels of down_proj's input unless it sees token 0 before it.

    Channel 5 is what blows up; a head of the first block in which 3 looks for 0 alone, and all others look elsewhere, takes it back.
    """

    def build(seed: int = 0, **config: Any) -> Any:
        model = tiny_llama(seed, **config)
        size, spike, (sink, look, key) = model.config.head_dim, 200.0, (5, 6, 7)
        with torch.no_grad():
            table = model.model.embed_tokens.weight = torch.nn.Parameter(model.model.embed_tokens.weight.clone())
            table[:, [sink, look, key]] = torch.tensor([0.0, -1.0, 0.0])
            table[SINK, [sink, look]] = torch.tensor([spike, 3.0])
            table[0, key] = 1.0
            for block in model.model.layers:
                for linear in (block.mlp.gate_proj, block.mlp.up_proj):
                    linear.weight[3] = 0.0
                    linear.weight[3, sink] = 10.0
                for linear in (block.self_attn.o_proj, block.mlp.down_proj):
                    linear.weight[sink] = 0.0
                block.mlp.down_proj.weight[:, 3] = 0.0
            first = model.model.layers[0]
            first.input_layernorm.weight[sink] = 0.0
            attention = first.self_attn
            for linear, rows in ((attention.q_proj, 2 * size), (attention.k_proj, size), (attention.v_proj, size)):
                linear.weight[:rows] = 0.0
            slow = size // 2 - 1  # the channel that positions turn least
            attention.q_proj.weight[slow, look] = attention.k_proj.weight[slow, key] = 500.0**0.5
            attention.v_proj.weight[0, key] = 1.0
            attention.o_proj.weight[:, : 2 * size] = 0.0
            attention.o_proj.weight[sink, 0] = -spike / float(first.input_layernorm(table[0])[key])
        return model

    return build


TRIED = [Trial([], 3, 3, 99.0, 5), Trial([0], 3, 0, 2.0, None)]  # a sink, and a prefix that takes it away


def behind(model: Any, tmp_path: Path, tokens: list[int] = TOKENS) -> Any:
    """Return a copy of the float ``model`` whose attention sees a prefix."""
    model = copy.deepcopy(model)
    structure = find_structure(model)
    assert use_prefixed_attention(model)
    store = RunStore(tmp_path / "run", {}, len(structure.blocks) + 2)
    run = PrefixRun(model, structure, store, tokens, {"input_ids": IDS, "use_cache": False}, 0, dict.fromkeys(structure.stacks, 0))
    with torch.no_grad():
        run.begin()
        for name in structure.blocks:
            run.place(name)
            run.runner.finish(name)
    store.close()
    return model


@torch.no_grad()
def whole(model: Any, ids: Tensor, tokens: list[int] = TOKENS) -> Tensor:
    """Return the logits of ``ids`` where ``model`` reads the prefix and them as one sequence."""
    first = torch.tensor([tokens]).expand(len(ids), -1)
    logits: Tensor = model(torch.cat((first, ids), 1)).logits[:, len(tokens) :]
    return logits


@pytest.mark.parametrize("way", ["sdpa", "eager"])
@torch.no_grad()
def test_tokens_behind_a_prefix_come_out_as_after_it(tiny_llama: Callable[..., Any], tmp_path: Path, way: str) -> None:
    model = tiny_llama(attn_implementation=way)
    expected, found = whole(model, IDS), behind(model, tmp_path)
    assert not torch.allclose(model(IDS).logits, expected, atol=1e-2)
    assert torch.allclose(found(IDS).logits, expected, atol=1e-4)
    cache, pieces = None, []
    for piece in IDS.split([1, 1, 7, 1, 14], 1):
        logits, cache = continued(found, piece, cache)
        pieces.append(logits)
    assert cache.get_seq_length() == IDS.shape[1]  # the prefix is no part of it
    assert torch.allclose(torch.cat(pieces, 1), expected, atol=1e-4)


@pytest.mark.parametrize("way", ["sdpa", "eager"])
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(tiny_llama: Callable[..., Any], tmp_path: Path, way: str) -> None:
    model = tiny_llama(attn_implementation=way)
    found, expected = behind(model, tmp_path), whole(model, IDS[:1, :9])
    pad = torch.full((1, 15), 1)
    for ids, kept in ((torch.cat((pad, IDS[:1, :9]), 1), slice(15, None)), (torch.cat((IDS[:1, :9], pad), 1), slice(9))):
        mask = torch.zeros(2, 24, dtype=torch.long)
        mask[0, kept], mask[1] = 1, 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = found(torch.cat((ids, IDS[1:2])), attention_mask=mask, position_ids=positions).logits
        assert torch.allclose(logits[:1, kept], expected, atol=1e-4)
        assert torch.allclose(logits[1:], whole(model, IDS[1:2]), atol=1e-4)


@torch.no_grad()
def test_generation_continues_as_after_the_prefix(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_llama()
    found = behind(model, tmp_path)
    first = torch.tensor([TOKENS])
    rules: dict[str, Any] = {"max_new_tokens": 8, "pad_token_id": 1, "eos_token_id": None, "do_sample": False}
    prompt = IDS[:1, :9]
    for more in ({}, {"num_beams": 3}, {"num_beams": 2, "cache_implementation": "static"}):
        wanted = model.generate(torch.cat((first, prompt), 1), **rules, **more)[:, 2:]
        assert torch.equal(found.generate(prompt, **rules, **more), wanted)
    padded = torch.cat((torch.full((1, 5), 1), prompt), 1)
    mask = (torch.arange(14) >= 5).long()[None]
    wanted = model.generate(torch.cat((first, prompt), 1), **rules)[:, 2:]
    assert torch.equal(found.generate(padded, attention_mask=mask, **rules)[:, 5:], wanted)


@torch.no_grad()
def test_a_window_never_forgets_the_prefix(tmp_path: Path) -> None:
    sizes = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "initializer_range": 0.3}  # fmt: skip
    torch.manual_seed(0)
    wide = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes, sliding_window=64)).eval()
    narrow = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes, sliding_window=12)).eval()
    narrow.load_state_dict(wide.state_dict())
    found = behind(narrow, tmp_path)
    assert torch.allclose(found(IDS[:, :10]).logits, whole(wide, IDS[:, :10]), atol=1e-4)
    forgetful = found(IDS).logits
    assert not torch.allclose(forgetful, whole(narrow, IDS), atol=1e-2)
    changed = IDS.clone()
    changed[:, 0] = 9  # beyond two windows from the end
    last = narrow.config.sliding_window * 2
    assert torch.allclose(found(changed).logits[:, last - 1 :], forgetful[:, last - 1 :], atol=1e-4)


def test_a_prefix_takes_the_sink_away(sinking: Callable[..., Any], tmp_path: Path) -> None:
    sinking().save_pretrained(tmp_path / "float")
    plans = {}
    for sinks in ("per_token", "prefix"):
        out = llm_fp4.quantize(tmp_path / "float", tmp_path / sinks, recipe(inputs={"sinks": sinks}), tokens=IDS)
        plans[sinks] = json.loads((out / "plan.json").read_text())
    down = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    for name in down:
        before, after = (plans[s]["inputs"][name] for s in ("per_token", "prefix"))
        assert before["sink_ratio"] > 64
        assert before["granularity"] == "per_token"
        assert after["sink_ratio"] < 8
        assert after["granularity"] == "per_tensor"
    prefix = plans["prefix"]["prefix"]
    assert prefix["tokens"] == [0]
    assert [(t["tokens"], t["outlying"]) for t in prefix["tried"]] == [([], 3), ([0], 0)]
    assert "prefix" not in plans["per_token"]


def test_without_a_sink_there_is_no_prefix(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "float")
    out = llm_fp4.quantize(tmp_path / "float", tmp_path / "out", recipe(), tokens=IDS)
    assert (
        "0 of 3 sequences have a token that exceeds the median 64 times"
        in json.loads((out / "plan.json").read_text())["prefix"]["reason"]
    )
    assert prefix_line(llm_fp4.inspect_model(out).prefix).startswith("no prefix: 0 of 3")
    wished = llm_fp4.inspect_model(tmp_path / "float", recipe(inputs={"prefix_tokens": 2})).prefix
    assert prefix_line(wished) == "up to 2 tokens before every sequence, as attention sinks"
    loaded, memory = llm_fp4.load(out), llm_fp4.quantize_module(tiny_llama(), [IDS], recipe())
    for model in (loaded, memory):
        assert not any(PREFIX in m._modules for m in model.modules())
        assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("fields", [EVERYTHING, {**IN_BLOCKS, "inputs": BLOCKS}], ids=["everything", "blocks"])
@torch.no_grad()
def test_disk_equals_memory_and_the_prefix_is_of_the_float_model(
    sinking: Callable[..., Any], tmp_path: Path, fields: dict[str, Any]
) -> None:
    sinking().save_pretrained(tmp_path / "float")
    out = llm_fp4.quantize(tmp_path / "float", tmp_path / "out", recipe(**fields), tokens=IDS)
    model, memory = llm_fp4.load(out), llm_fp4.quantize_module(sinking(), [IDS], recipe(**fields))
    assert torch.allclose(model(IDS).logits, memory(IDS).logits, atol=1e-3)
    exact = behind(sinking(), tmp_path, [0])
    for ours, flat in zip(model.model.layers, exact.model.layers, strict=True):
        for name in ("prefix_key", "prefix_value"):
            got, wanted = (getattr(b.self_attn.get_submodule(PREFIX), name) for b in (ours, flat))
            assert torch.allclose(got, wanted, atol=1e-5)
    pieces, cache = [], None
    for piece in IDS.split(6, 1):
        logits, cache = continued(model, piece, cache)
        pieces.append(logits)
    assert torch.allclose(torch.cat(pieces, 1), model(IDS).logits, atol=1e-3)
    eager = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    assert eager.config._attn_implementation == "llm_fp4"
    assert torch.allclose(eager(IDS).logits, model(IDS).logits, atol=1e-3)
    narrow = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    assert narrow.model.layers[0].self_attn.get_submodule(PREFIX).prefix_key.dtype == torch.float32
    assert (narrow(IDS).logits.float() - model(IDS).logits).norm() < 0.2 * model(IDS).logits.norm()
    report = llm_fp4.inspect_model(out)
    assert report.prefix is not None
    assert prefix_line(report.prefix) == "token 0 before every sequence: 0 of 3 sequences have an outlying token, 3 without it"
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(llm_fp4.load(tmp_path / "again")(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("done", [0, 1, 2])
@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_an_interrupted_run_gives_the_same_bytes(sinking: Callable[..., Any], tmp_path: Path, done: int, rotation: str) -> None:
    sinking().save_pretrained(tmp_path / "float")
    wish = recipe(**EVERYTHING, transforms={"rotation": rotation})

    def strike(stage: str, so_far: int, total: int) -> None:
        if (stage, so_far) == ("quantize", done):
            raise KeyboardInterrupt

    whole_run = llm_fp4.quantize(tmp_path / "float", tmp_path / "whole", wish, tokens=IDS)
    with pytest.raises(KeyboardInterrupt):
        llm_fp4.quantize(tmp_path / "float", tmp_path / "out", wish, tokens=IDS, progress=strike)
    continued_run = llm_fp4.quantize(tmp_path / "float", tmp_path / "out", wish, tokens=IDS)
    assert json.loads((whole_run / "plan.json").read_text())["prefix"]["tokens"] == [0]
    for file in whole_run.iterdir():
        assert file.read_bytes() == (continued_run / file.name).read_bytes(), file.name


@pytest.mark.skipif(available() == ["torch"], reason="no compiled kernels here")
@pytest.mark.parametrize("fields", [{}, {**IN_BLOCKS, "inputs": BLOCKS}], ids=["rows", "blocks"])
@torch.no_grad()
def test_compiled_decoding_reads_the_prefix(sinking: Callable[..., Any], tmp_path: Path, fields: dict[str, Any]) -> None:
    sinking().save_pretrained(tmp_path / "float")
    every = recipe(bits={"embedding": 16, "activation": 4}, ignore=[], **fields)
    model = llm_fp4.load(llm_fp4.quantize(tmp_path / "float", tmp_path / "out", every, tokens=IDS))
    decoder = Decoder(model, capacity=4)
    found = torch.stack([decoder.prompt(IDS[0, :5]), *(decoder.step(int(t)) for t in IDS[0, 5:])])
    expected = model(IDS[:1]).logits[0, 4:]
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("way", [fused_attention, quantized_attention])
def test_attention_without_a_mask_sees_what_it_saw_and_its_prefix(tiny_llama: Callable[..., Any], way: Callable[..., Any]) -> None:
    module = tiny_llama().model.layers[0].self_attn
    query, key, value = (
        torch.randn(2, heads, 5, 8, generator=torch.Generator().manual_seed(i)) for i, heads in enumerate((4, 2, 2))
    )
    module.add_module(PREFIX, AttentionPrefix.of(key[0, :, :3], value[1, :, :3]))
    later = torch.ones(5, 5).tril() if way is fused_attention else torch.ones(5, 5)  # only fused attention takes none for causal
    seen = torch.cat((torch.ones(5, 3), later), 1).bool()
    keys, values = (torch.cat((p[None].expand(2, -1, -1, -1), x), 2) for p, x in ((key[0, :, :3], key), (value[1, :, :3], value)))
    wide = [x.repeat_interleave(2, 1) for x in (keys, values)]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *wide, attn_mask=seen).transpose(1, 2)
    found, _ = way(module, query, key, value, None, scaling=module.scaling)
    assert torch.allclose(found, expected, atol=1e-5)
    last, _ = way(module, query[:, :, -1:], key, value, None, scaling=module.scaling)  # one token sees all
    assert torch.allclose(last, expected[:, -1:], atol=1e-5)
    own = torch.eye(5).bool()[None, None]  # every token sees itself
    mask = own if way is fused_attention else torch.where(own, 0.0, torch.finfo(torch.float32).min)
    alone = torch.cat((torch.ones(5, 3).bool(), own[0, 0]), 1)
    expected = torch.nn.functional.scaled_dot_product_attention(query, *wide, attn_mask=alone).transpose(1, 2)
    found, _ = way(module, query, key, value, mask, scaling=module.scaling)
    assert torch.allclose(found, expected, atol=1e-5)


def test_another_attention_implementation_does_not_lose_the_prefix(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = behind(tiny_llama(), tmp_path)
    model.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedError, match="a prefix of 2 tokens, which attn_implementation 'sdpa' would leave out"):
        model(IDS)


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
GPTJ: dict[str, Any] = {
    "vocab_size": 260,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "rotary_dim": 8,
    "n_positions": 64,
    "initializer_range": 0.5,
}
SMALL: dict[str, Any] = {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=260)), "adds positions"),
        (lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, intermediate_size=64)), "does not generate"),
        (lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=260, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)),
         "it has 2 stacks"),
        (lambda: transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=260, hidden_size=32, n_layer=2, n_head=4)), "attention interface"),
        (lambda: transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=260, hidden_size=32, num_hidden_layers=2)), "takes no position_ids"),
        (lambda: transformers.GPTJForCausalLM(transformers.GPTJConfig(**GPTJ)),
         "otherwise than by"),
        (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, intermediate_size=64, rope_parameters=DYNAMIC)),
         "dynamic rotary positions"),
    ],
)  # fmt: skip
def test_models_without_a_place_for_a_prefix_are_refused(
    make: Callable[[], Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_fp4.pipeline.choosing._choose", lambda trials, first, recipe, progress: TRIED)
    with pytest.raises(UnsupportedError, match=f"{why}.*set inputs.sinks to per_token"):
        llm_fp4.quantize_module(make().eval(), [{"input_ids": IDS}], recipe(ignore=[]))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"attention": {"bits": 8}}, "quantized attention products are not implemented together"),
        ({"cache": {"bits": 8}}, "a quantized cache are not implemented together"),
        ({"budget": {"average_bits": 5}}, "a budget are not implemented together"),
        ({"search": {"objective": "fisher"}}, "fisher are not implemented together"),
        ({"inputs": {"prefix_tokens": 9}}, "less than or equal to 8"),
    ],
)
def test_recipes_that_have_no_place_for_a_prefix_are_refused(fields: dict[str, Any], why: str, tmp_path: Path) -> None:
    (tmp_path / "wish.yaml").write_text(json.dumps({**fields, "inputs": {"sinks": "prefix", **fields.get("inputs", {})}}))
    with pytest.raises(RecipeError, match=why):
        llm_fp4.load_recipe(str(tmp_path / "wish.yaml"))


def test_targets_and_damage_are_named(sinking: Callable[..., Any], tmp_path: Path) -> None:
    sinking().save_pretrained(tmp_path / "float")
    out = llm_fp4.quantize(tmp_path / "float", tmp_path / "out", recipe(), tokens=IDS)
    for target in ("openvino", "onnx", "compressed-tensors", "gguf", "humming"):
        with pytest.raises(
            UnsupportedError, match=f"{target} cannot hold the prefix that attention sees .model.layers.0.self_attn"
        ):
            api.hold(out, target)
    shard = next(f for f in sorted(out.glob("*.safetensors")) if any(PREFIX in n for n in load_file(f)))
    tensors = load_file(shard)
    name = next(n for n in tensors if n.endswith("prefix_key"))
    for damaged, why in (
        ({**tensors, name: tensors[name] * float("nan")}, "are not all numbers"),
        ({**tensors, name: tensors[name][:, :, :4].contiguous()}, "the manifest makes it"),
        ({n: t for n, t in tensors.items() if n != name}, "lacks the tensor .*prefix_key"),
    ):
        save_file(damaged, shard, {"format": "pt"})
        with pytest.raises(CheckpointError, match=why):
            llm_fp4.load(out)
    save_file(tensors, shard, {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    quantization = config["quantization_config"]
    assert quantization["version"] == 2
    modules = quantization.pop("prefix")["modules"]
    first = "model.layers.0.self_attn"
    for damage, why in (
        ({}, f"holds {first}.attention_prefix.prefix_.*, which config.json does not name"),
        ({"prefix": {"tokens": [0]}}, "prefix that cannot be read"),
        ({"prefix": {"modules": {n: m for n, m in modules.items() if n != first}}}, "which config.json does not name"),
        ({"prefix": {"modules": {**modules, first: {**modules[first], "tokens": 0}}}}, "prefix that cannot be read"),
    ):
        (out / "config.json").write_text(json.dumps({**config, "quantization_config": {**quantization, **damage}}))
        with pytest.raises(CheckpointError, match=why):
            llm_fp4.load(out)


def test_a_prefix_of_other_heads_is_named(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = behind(tiny_llama(), tmp_path)
    model.model.layers[0].self_attn.add_module(PREFIX, AttentionPrefix.of(torch.zeros(1, 2, 8), torch.zeros(1, 2, 8)))
    with pytest.raises(CheckpointError, match="prefix has 1 heads of 8 channels, its attention 2 of 8"):
        model(IDS)


@torch.no_grad()
def test_attention_that_picks_its_keys_is_refused(tiny_llama: Callable[..., Any]) -> None:
    module = tiny_llama().model.layers[0].self_attn
    heads = torch.randn(1, 4, 5, 8)
    with pytest.raises(UnsupportedError, match="picks the keys that a query sees"):
        fused_attention(module, heads, heads[:, :2], heads[:, :2], None, indices=torch.zeros(1, 5, 2))
