"""gguf reads what we wrote to our values, bit for bit; llama.cpp loads and runs it."""

from __future__ import annotations

import importlib
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

gguf = pytest.importorskip("gguf", reason="gguf is optional: pip install 'llm-fp4[gguf]'")

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


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the benchmark's module on how engines run our files."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    return importlib.import_module("engine_runs")


def predictions(folder: Path, tokens: list[int], rounding: Callable[[torch.Tensor], torch.Tensor] | None) -> torch.Tensor:
    """Return our log-probabilities with inputs in float, or rounded by ``rounding``."""
    import llm_fp4
    from llm_fp4.nn import QuantLinear

    model = llm_fp4.load(folder, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, QuantLinear) and rounding is not None:
            module.register_forward_pre_hook(lambda _, args: (rounding(args[0]),))
    with torch.no_grad():
        result: torch.Tensor = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return result


def llama_cpp(path: Path, tokens: list[int]) -> torch.Tensor:
    """Return llama.cpp's log-probabilities; its keys and values stay in float32, where the usual float16 turns over 8-bit roundings."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = 64, 1, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.no_extra_bufts = True  # no repacked weights, which are summed in another order
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        params.hostnames, params.port = ["127.0.0.1"], free.getsockname()[1]
    server = xllamacpp.Server(params)  # raises where llama.cpp cannot load the file

    def ask(**body: Any) -> Any:
        data = json.dumps({"temperature": 0, "ignore_eos": True, **body}).encode()
        request = urllib.request.Request(f"{server.listening_address}/completion", data, {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request))

    assert ask(prompt=tokens, n_predict=8)["content"]
    rows = torch.full((len(tokens), 260), -200.0, dtype=torch.float64)
    for end in range(1, len(tokens) + 1):
        # "!" is what it then says, whatever it predicts: of a token that is no whole character the server tells nothing.
        # The probabilities are those before the bias
        asked = {"n_predict": 1, "n_probs": 260, "logit_bias": [[2, 1000.0]]}
        (answer,) = ask(prompt=tokens[:end], **asked)["completion_probabilities"]
        for each in answer["top_logprobs"]:
            rows[end - 1, each["id"]] = each["logprob"]
    return rows


@pytest.mark.parametrize("kind", BLOCKS)
def test_llama_cpp_predicts_the_same(kind: str, merging: Callable[..., Path], runs: Any, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp (xllamacpp) is not installed here; see make test-engines")
    formats, rules = BLOCKS[kind]
    folder = merging(formats, "16/4/16", rules=rules, hidden_size=128, intermediate_size=256)
    export(folder, tmp_path / "out", "gguf")
    written, tokens = tmp_path / "out" / "model.gguf", list(range(3, 25))
    runs.in_float(written, tmp_path / "float.gguf")
    # the same weights in float: the graph is ours. As written: so are the 4-bit products, 8-bit inputs included
    for path, rounding, bar in ((tmp_path / "float.gguf", None, 1e-6), (written, runs.q8_0, 1e-3)):
        ours, theirs = predictions(folder, tokens, rounding), llama_cpp(path, tokens)
        kl = (ours.exp() * (ours - theirs)).sum(-1)
        assert kl.mean() <= bar, kl
        assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def test_what_gguf_would_round_is_refused(quantized: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"cannot hold the E2M1 weights of model.layers.0.* without rounding.*mxfp4"):
        export(quantized("e2m1", "16/4/16"), tmp_path / "out", "gguf")
    with pytest.raises(UnsupportedError, match=r"float16, which would round those of model.layers.0"):
        export(quantized("e1m2", "16/4/16"), tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()
