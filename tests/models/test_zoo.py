"""Tiny random models of many families: disk equals memory, or the model is refused by name before anything is spent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import llm_fp4
from llm_fp4.errors import UnsupportedError
from llm_fp4.nn import PackedModule
from llm_fp4.recipe import Recipe

WIDE = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_LIKE = {**WIDE, "intermediate_size": 48, "num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen2": LLAMA_LIKE,
    "Qwen3": {**LLAMA_LIKE, "head_dim": 8, "tie_word_embeddings": True},
    "Gemma3": {**LLAMA_LIKE, "head_dim": 8, "sliding_window": 8},
    "Mistral": LLAMA_LIKE,
    "Phi3": {**LLAMA_LIKE, "pad_token_id": 0},
    "GPTNeoX": {**WIDE, "intermediate_size": 48},
    "Bloom": {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "OPT": {
        **WIDE, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2,
    },
}  # fmt: skip
HEADS = {"Gemma3": "Gemma3ForCausalLM"}
RULES = Recipe.model_validate({"search": {"rounds": 1}})


def build(name: str) -> Any:
    config_class = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, HEADS.get(name, f"{name}ForCausalLM"))(config_class(**MODELS[name], initializer_range=0.2))
    return model.eval()


def tokens() -> torch.Tensor:
    return torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_disk_equals_memory(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "float")
    model = llm_fp4.load(llm_fp4.quantize(tmp_path / "float", tmp_path / "out", RULES, tokens=tokens()))
    memory = llm_fp4.quantize_module(build(name), [tokens()], RULES)
    ours, expected, flat = (m(tokens(), use_cache=False).logits.detach() for m in (model, memory, build(name)))
    assert torch.allclose(ours, expected, atol=1e-4 * float(expected.abs().max()))
    relative = ((ours - flat).square().sum() / flat.square().sum()).item()
    assert 0 < relative < 0.9
    assert sum(isinstance(m, PackedModule) for m in model.modules()) > 8


def test_a_run_of_tuple_returning_blocks_resumes_at_the_tail(tmp_path: Path) -> None:
    build("Bloom").save_pretrained(tmp_path / "float")

    def killed(stage: str, done: int, total: int) -> None:
        if stage == "quantize" and done == total - 1:
            raise KeyboardInterrupt

    whole = llm_fp4.quantize(tmp_path / "float", tmp_path / "whole", RULES, tokens=tokens())
    with pytest.raises(KeyboardInterrupt):
        llm_fp4.quantize(tmp_path / "float", tmp_path / "out", RULES, tokens=tokens(), progress=killed)
    out = llm_fp4.quantize(tmp_path / "float", tmp_path / "out", RULES, tokens=tokens())
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


def test_experts_multiplied_all_at_once_are_refused_not_skipped() -> None:
    fields = {
        **LLAMA_LIKE,
        "head_dim": 8,
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "pad_token_id": 0,
    }
    llama4 = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**fields))
    with pytest.raises(UnsupportedError, match=r"weight this version cannot quantize.*--ignore"):
        llm_fp4.quantize_module(llama4, [tokens()], RULES)


def test_a_bfloat16_source_stays_bfloat16_where_it_is_not_quantized(tmp_path: Path) -> None:
    build("Qwen2").to(torch.bfloat16).save_pretrained(tmp_path / "float")
    model = llm_fp4.load(llm_fp4.quantize(tmp_path / "float", tmp_path / "out", RULES, tokens=tokens()))
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert model.model.layers[0].self_attn.q_proj.bias.dtype == torch.bfloat16
    assert model(tokens()).logits.dtype == torch.bfloat16


def test_quantize_module_gives_every_other_tensor_its_dtype_back() -> None:
    model = build("Qwen2").to(torch.bfloat16)
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.float()
    frequencies = model.model.rotary_emb.inv_freq.clone()
    llm_fp4.quantize_module(model, [tokens()], RULES)
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert model(tokens()).logits.dtype == torch.bfloat16


def test_work_between_blocks_is_done_by_the_model() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(8, 8)) for _ in range(2)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x) * 8
            return x

    torch.manual_seed(0)
    model, x = Model(), torch.randn(64, 8)
    flat = model(x)
    quantized = llm_fp4.quantize_module(
        model, [x], Recipe.model_validate({"bits": {"embedding": 16, "weight": 8, "activation": 8}})
    )
    assert 0 < ((quantized(x) - flat).square().sum() / flat.square().sum()).item() < 1e-2
