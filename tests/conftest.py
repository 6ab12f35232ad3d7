"""Small models, tokenizers and real data shared by the tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

VOCABULARY = 260  # "<s>", "</s>", 256 bytes, and two rows of the embedding that no token uses


@pytest.fixture
def tiny_llama() -> Callable[..., Any]:
    """Return a factory of random float32 LLaMA models of two blocks: ``tiny_llama(seed=0, **config)``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(seed: int = 0, **config: Any) -> Any:
        sizes = {
            "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1,
        }  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            # a wide initialization, so that predictions differ from token to token
            return LlamaForCausalLM(LlamaConfig(**{**sizes, "initializer_range": 0.3, **config})).eval()

    return build


@pytest.fixture
def spiked_llama(tiny_llama: Callable[..., Any]) -> Callable[..., Any]:
    """Return a factory like ``tiny_llama``, of models with a channel in every input that is forty times larger than the others."""

    def build(seed: int = 0, **config: Any) -> Any:
        model = tiny_llama(seed, **config)
        for block in model.model.layers:
            for norm, readers in (
                (block.input_layernorm, (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)),
                (block.post_attention_layernorm, (block.mlp.gate_proj, block.mlp.up_proj)),
            ):
                norm.weight.data[5] *= 40.0
                for reader in readers:
                    reader.weight.data[:, 5] /= 40.0
            block.mlp.up_proj.weight.data[3] *= 40.0
            block.mlp.down_proj.weight.data[:, 3] /= 40.0
        return model

    return build


@pytest.fixture
def tiny_tokenizer() -> Any:
    """Return a tokenizer with a token a byte after "<s>" (0) and "</s>" (1), neither added by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(["<s>", "</s>", *alphabet])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def shared_data() -> Path:
    """Return the folder of real models and data beside the repository; skip where there is none."""
    folder = (Path(__file__).resolve().parents[1] / ".." / "shared" / "data").resolve()
    if not folder.is_dir():
        pytest.skip("the real models and data are not beside the repository (../shared/data)")
    return folder
