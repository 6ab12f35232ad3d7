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
from torch import Tensor

import llm_fp4
from llm_fp4 import api
from llm_fp4.checkpoint import RunStore
from llm_fp4.errors import CheckpointError, RecipeError, UnsupportedError
from llm_fp4.integrations.attention import use_prefixed_attention
from llm_fp4.integrations.decoder import Decoder
from llm_fp4.models import continued, find_structure
from llm_fp4.nn import PREFIX
from llm_fp4.pipeline.prefix import PrefixRun
from llm_fp4.recipe import Recipe

SINK = 3
IDS = torch.randint(4, 260, (3, 24), generator=torch.Generator().manual_seed(1))
IDS[:, 0] = SINK
TOKENS = [7, 0]


def recipe(**fields: Any) -> Recipe:
    data = {"search": {"rounds": 1}, "bits": {"embedding": 16}, "ignore": ["lm_head", "self_attn.*"], **fields}
    return Recipe.model_validate({**data, "inputs": {"sinks": "prefix", **fields.get("inputs", {})}})


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
