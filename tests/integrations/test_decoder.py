"""Decoding in compiled code against the model's own forward, token by token, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

import llm_fp4
from llm_fp4.errors import UnsupportedError
from llm_fp4.integrations.decoder import Decoder
from llm_fp4.kernels.compiled import available, select
from llm_fp4.recipe import Recipe

pytestmark = pytest.mark.skipif(
    available() == ["torch"], reason="this installation has no compiled CPU kernels; build it with a C++ compiler"
)
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 50, "initializer_range": 0.2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {"attention_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 1e-2},
    "Qwen2": {},
    "Qwen3": {"head_dim": 24},
    "Mistral": {"sliding_window": None},
}
PLAIN = {"search": {"rounds": 1}}
NVFP4 = {"formats": ["e2m1"], "granularity": "per_block", "block_size": 16, "scale_dtype": "e4m3"}
Q4_0 = {"formats": ["e1m2"], "granularity": "per_block", "block_size": 32, "scale_dtype": "float16"}
MXFP4 = {"formats": ["e2m1"], "granularity": "per_block", "block_size": 32, "scale_dtype": "e8m0"}
RECIPES: dict[str, dict[str, Any]] = {
    "W4A8": {**PLAIN, "bits": {"embedding": 16, "activation": 8}, "inputs": {"formats": ["e1m6"]}},
    "weight only": {**PLAIN, "bits": {"activation": 16}},
    "transformed": {
        **PLAIN,
        "overrides": [{"targets": ["down_proj", "q_proj", "k_proj", "v_proj"], "input_transform": "hadamard"}],
    },
    "float head": {**PLAIN, "ignore": ["lm_head"]},
    "NVFP4": {**PLAIN, "ignore": ["lm_head"], "weights": NVFP4, "inputs": {**NVFP4, "shift": False}},
    "MXFP4": {**PLAIN, "ignore": ["lm_head"], "weights": MXFP4, "inputs": {**MXFP4, "shift": False}},
    "NVFP4 weight only": {**PLAIN, "bits": {"activation": 16}, "ignore": ["lm_head"], "weights": NVFP4},
    "Q4_0": {**PLAIN, "bits": {"activation": 16}, "ignore": ["lm_head"], "weights": Q4_0},
}


def build(name: str, **config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = getattr(transformers, f"{name}Config")(**SIZES, **config)
        model = getattr(transformers, f"{name}ForCausalLM")(made)
        for module in model.modules():  # norms that do something
            if type(module).__name__.endswith("RMSNorm"):
                module.weight.data.uniform_(0.5, 1.5)
    return model.eval()


def ids(count: int = 20) -> torch.Tensor:
    return torch.randint(3, 96, (count,), generator=torch.Generator().manual_seed(2))


def quantized(model: Any, recipe: dict[str, Any] = PLAIN) -> Any:
    return llm_fp4.quantize_module(model, [ids(96).view(4, 24)], Recipe.model_validate(recipe))


def check(model: Any, capacity: int = 256) -> None:
    """Each token's logits are the model's own but for float32 rounding, from a prompt and from nothing."""
    decoder, text = Decoder(model, capacity), ids()
    with torch.no_grad():
        expected = model(text[None]).logits[0].float()
    for start in (7, 1):
        got = torch.stack([decoder.prompt(text[:start]), *(decoder.step(int(t)) for t in text[start:])])
        assert torch.allclose(got, expected[start - 1 :], atol=2e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_every_step_has_the_models_logits(name: str) -> None:
    check(quantized(build(name, **MODELS[name])))


@pytest.mark.parametrize("recipe", RECIPES)
def test_other_inputs_and_heads(recipe: str) -> None:
    check(quantized(build("Llama"), RECIPES[recipe]))


def test_the_cache_grows() -> None:
    check(quantized(build("Llama")), capacity=6)


def test_every_kernel_decodes_alike() -> None:
    model, text = quantized(build("Llama")), ids()
    logits = []
    try:
        for name in available()[:-1]:
            select(name)
            decoder = Decoder(model)
            logits.append(torch.stack([decoder.step(int(t)) for t in text]))
    finally:
        select()
    assert all(torch.equal(logits[0], other) for other in logits)


def test_threads_change_nothing() -> None:
    """Wide enough and long enough that weights and heads are shared among threads."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wide = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **sizes})).eval()
    model = llm_fp4.quantize_module(wide, [ids(96).view(4, 24)], "minmax-fp")
    before, last = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            decoder = Decoder(model)
            last.append([decoder.step(int(t)) for t in ids(530)][-1])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*last)


def test_generation_is_that_of_transformers(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm_fp4.api import Loaded, generate_text, generating

    model = quantized(tiny_llama())
    loaded = Loaded(model, tiny_tokenizer, True, "tiny")
    pieces: list[str] = []
    for temperature in (0.0, 0.8):
        compiled = generate_text(loaded, "The sea", max_new_tokens=20, temperature=temperature, on_text=pieces.append)
        with monkeypatch.context() as patch:
            patch.setattr(generating, "Decoder", refuse)
            plain = generate_text(loaded, "The sea", max_new_tokens=20, temperature=temperature)
        assert compiled == plain
        assert "".join(pieces) == compiled
        pieces.clear()


def refuse(*_: Any) -> Decoder:
    raise UnsupportedError("not here")


@pytest.mark.parametrize(
    ("name", "config", "problem"),
    [
        ("Llama", {"hidden_act": "gelu"}, "another activation than SiLU"),
        ("Mistral", {"sliding_window": 8}, "attends to a sliding window"),
        ("GPTNeoX", {}, "has no model.embed_tokens|has no model"),
        ("Granite", {"residual_multiplier": 0.3}, "gives other logits"),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic rotary"),
    ],
)
def test_what_differs_is_refused_by_name(name: str, config: dict[str, Any], problem: str) -> None:
    with pytest.raises(UnsupportedError, match=problem):
        Decoder(quantized(build(name, **config)))


def test_float_models_and_no_kernels_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="q_proj is not quantized"):
        Decoder(build("Llama"))
    model = quantized(build("Llama"))
    try:
        select("torch")
        with pytest.raises(UnsupportedError, match="no compiled CPU kernels"):
            Decoder(model)
    finally:
        select()
