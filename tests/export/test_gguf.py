"""gguf reads what we wrote to our values, bit for bit; llama.cpp runs it."""

from __future__ import annotations

import json
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_fp4.api import export
from llm_fp4.errors import UnsupportedError
from llm_fp4.export.gguf_model import rotary_rows

gguf = pytest.importorskip("gguf", reason="gguf is optional: pip install llm-fp4[gguf]")

BLOCKS = {
    "Q4_0": ("e1m2", {"granularity": "per_block", "block_size": 32, "scale_dtype": "float16"}),
    "MXFP4": ("e2m1", {"granularity": "per_block", "block_size": 32, "scale_dtype": "e8m0"}),
    "NVFP4": ("e2m1", {"granularity": "per_block", "block_size": 16, "scale_dtype": "e4m3"}),
}


@pytest.fixture
def merging(quantized: Callable[..., Path]) -> Callable[..., Path]:
    """Return ``quantized``, whose tokenizer then merges one pair: llama.cpp wants merges."""

    def make(*arguments: Any, **options: Any) -> Path:
        folder = quantized(*arguments, **options)
        data = json.loads((folder / "tokenizer.json").read_text())
        data["model"]["vocab"]["Ġa"] = 258
        data["model"]["merges"] = [["Ġ", "a"]]
        (folder / "tokenizer.json").write_text(json.dumps(data))
        return folder

    return make


def read(path: Path) -> dict[str, tuple[str, torch.Tensor]]:
    """Return type and values of every tensor, as gguf dequantizes them."""
    return {
        t.name: (t.tensor_type.name, torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()))
        for t in gguf.GGUFReader(path).tensors
    }


@pytest.mark.parametrize("kind", BLOCKS)
def test_weights_are_equal_bit_for_bit(kind: str, merging: Callable[..., Path], values: Any, tmp_path: Path) -> None:
    formats, rules = BLOCKS[kind]
    folder = merging(formats, "16/4/16", rules=rules, intermediate_size=128, attention_bias=True)
    made = export(folder, tmp_path / "out", "gguf")
    assert set(made.holding.containers.values()) == {kind}
    found, ours = read(tmp_path / "out" / "model.gguf"), values(folder)
    config = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}
    places = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.o_proj": "attn_output",
        "mlp.down_proj": "ffn_down",
    }
    for name, place in places.items():
        name, place = f"model.layers.1.{name}", f"blk.1.{place}"
        held, value = found[f"{place}.weight"]
        assert held == kind
        scale = found[f"{place}.scale"][1] if kind == "NVFP4" else 1.0
        assert torch.equal(value * scale, rotary_rows(ours[name], name, config)), name
    assert found["blk.0.attn_norm.weight"][0] == "F32"
    assert found["blk.0.attn_q.bias"][1].shape == (64,)


def next_tokens(native: Any, path: Path, ids: list[int]) -> torch.Tensor:
    """Return llama.cpp's log-probabilities of all 260 tokens after every prefix of ``ids``."""
    params = native.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = 64, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        params.hostnames, params.port = ["127.0.0.1"], free.getsockname()[1]
    server = native.Server(params)
    rows = torch.full((len(ids), 260), -100.0)
    for length in range(1, len(ids) + 1):
        body = {"prompt": ids[:length], "n_predict": 1, "temperature": 0, "cache_prompt": False, "n_probs": 260, "ignore_eos": True}
        request = urllib.request.Request(
            f"{server.listening_address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        answer = json.load(urllib.request.urlopen(request))
        assert "completion_probabilities" in answer, answer
        answer = answer["completion_probabilities"][0]
        for token in answer["top_logprobs"]:
            rows[length - 1, token["id"]] = token["logprob"]
    return rows


@pytest.mark.parametrize("kind", BLOCKS)
def test_llama_cpp_runs_it(kind: str, merging: Callable[..., Path], weight_only: Any, tmp_path: Path) -> None:
    native = pytest.importorskip("xllamacpp", reason="llama.cpp (xllamacpp) is not installed here; see make test-engines")
    formats, rules = BLOCKS[kind]
    # sizes of two superblocks of NVFP4, and a gentle initialization: llama.cpp rounds inputs to 8 bits
    folder = merging(formats, "16/4/16", rules=rules, hidden_size=128, intermediate_size=256, initializer_range=0.06)
    export(folder, tmp_path / "out", "gguf")
    ids = list(range(3, 25))
    theirs = next_tokens(native, tmp_path / "out" / "model.gguf", ids)
    tokens = torch.tensor([ids])
    ours = weight_only(folder, tokens, torch.ones_like(tokens))[0].log_softmax(-1)
    kl = (ours.exp() * (ours - theirs)).sum(-1)
    assert kl.abs().max() <= 1e-3
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() >= 0.9


def test_what_gguf_would_round_is_refused(quantized: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"cannot hold the E2M1 weights of model.layers.0.* without rounding.*mxfp4"):
        export(quantized("e2m1", "16/4/16"), tmp_path / "out", "gguf")
    with pytest.raises(UnsupportedError, match=r"float16, which would round those of model.layers.0"):
        export(quantized("e1m2", "16/4/16"), tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()
