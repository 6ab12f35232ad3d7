"""Float models and texts that cannot be used: one sentence, a non-zero exit code, and nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

QUICK = ["--sequences", "2", "--length", "32", "--rounds", "1", "--quiet"]
Refuse = Callable[..., str]


@pytest.fixture
def not_quantized(refused: Any, tmp_path: Path) -> Refuse:
    """Return a function that quantizes a source, which must fail and leave no output, and returns the sentence."""

    def run(source: Path | str, *options: Any, code: int = 1) -> str:
        out = tmp_path / "out"
        sentence: str = refused("quantize", source, out, *options, *QUICK, code=code)
        assert not out.exists()
        assert not out.with_name("out.partial").exists()
        return sentence

    return run


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_missing_source(not_quantized: Refuse, tmp_path: Path) -> None:
    sentence = not_quantized(tmp_path / "nowhere")
    assert "nowhere" in sentence
    assert "neither an existing path nor a hub name" in sentence


def test_directory_without_config(not_quantized: Refuse, tmp_path: Path) -> None:
    assert "holds no config.json" in not_quantized(tmp_path)


def test_file_that_is_no_model(not_quantized: Refuse, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"1234")
    assert "not .gguf" in not_quantized(tmp_path / "model.bin")


def test_config_that_is_no_json(not_quantized: Refuse, source: Path) -> None:
    (source / "config.json").write_text("{")
    assert "config.json" in not_quantized(source)


def test_truncated_safetensors(not_quantized: Refuse, source: Path) -> None:
    shard = source / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    sentence = not_quantized(source)
    assert "model.safetensors is not a complete safetensors file" in sentence
    assert "download" in sentence


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x08\x00\x00\x00\x00\x00\x00\x00notjson!"])
def test_corrupt_safetensors(not_quantized: Refuse, source: Path, content: bytes) -> None:
    (source / "model.safetensors").write_bytes(content)
    assert "is not a complete safetensors file" in not_quantized(source)


def test_no_weights(not_quantized: Refuse, source: Path) -> None:
    (source / "model.safetensors").unlink()
    assert "holds no .safetensors file" in not_quantized(source)


def test_index_that_names_a_missing_shard(not_quantized: Refuse, save: Callable[..., Path]) -> None:
    source = save(shard_size="40KB")
    shard = sorted(source.glob("model-*.safetensors"))[1]
    shard.unlink()
    sentence = not_quantized(source)
    assert shard.name in sentence
    assert "is missing" in sentence


@pytest.mark.parametrize("content", ["not json", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": ["b"]}}'])
def test_index_that_is_none(not_quantized: Refuse, source: Path, content: str) -> None:
    (source / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json is not a valid shard index" in not_quantized(source)


def test_index_that_leaves_its_directory(not_quantized: Refuse, save: Callable[..., Path]) -> None:
    source = save(shard_size="40KB")
    index = source / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    assert "not a file of this directory" in not_quantized(source)


def test_integer_weights(not_quantized: Refuse, source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].to(torch.int32)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    sentence = not_quantized(source)
    assert "model.layers.1.mlp.up_proj.weight" in sentence
    assert "int32, not a float type" in sentence


def test_missing_weight(not_quantized: Refuse, source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in not_quantized(source)


def test_nan_in_a_weight(refused: Any, source: Path, tmp_path: Path, text: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    sentence = refused("quantize", source, tmp_path / "out", "--calibration", text, *QUICK)
    assert "the weight of model.layers.1.mlp.up_proj" in sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 10**9}, {"hidden_size": 10**12}, {"vocab_size": 10**15}, {"head_dim": 10**12},
        {"intermediate_size": -5}, {"hidden_size": 64}, {"num_attention_heads": 0}, {"hidden_size": "wide"},
    ],
)  # fmt: skip
def test_sizes_that_do_not_belong_to_the_weights(not_quantized: Refuse, source: Path, values: dict[str, Any]) -> None:
    edit_config(source, **values)
    assert "config.json" in not_quantized(source)


def test_architecture_that_is_not_known(not_quantized: Refuse, source: Path) -> None:
    edit_config(source, model_type="abacus", architectures=["AbacusForCausalLM"])
    assert "abacus" in not_quantized(source)


def test_model_of_layers_that_cannot_be_quantized(not_quantized: Refuse, tmp_path: Path, tiny_tokenizer: Any) -> None:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    folder = tmp_path / "llama4"
    config = Llama4TextConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0,
    )  # fmt: skip
    Llama4ForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    assert "whose weight this version cannot quantize" in not_quantized(folder)


def test_checkpoint_as_source(refused: Any, checkpoint: Path, tmp_path: Path) -> None:
    assert "quantized already" in refused("quantize", checkpoint, tmp_path / "again", *QUICK)


def test_empty_text(not_quantized: Refuse, source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    assert "is empty" in not_quantized(source, "--calibration", tmp_path / "empty.txt")


def test_too_short_text(not_quantized: Refuse, source: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a" * 50)
    sentence = not_quantized(source, "--calibration", tmp_path / "short.txt")
    assert "holds 50 tokens" in sentence
    assert "need 64" in sentence


def test_missing_text(not_quantized: Refuse, source: Path, tmp_path: Path) -> None:
    for name in ("no.txt", "no.tsv"):
        assert f"{name} does not exist" in not_quantized(source, "--calibration", tmp_path / name)
        assert f"{name} does not exist" in not_quantized(source, "--calibration", tmp_path / name, "--plan-only")


def test_a_refused_run_does_not_stand_in_the_way(refused: Any, llm_fp4: Any, source: Path, tmp_path: Path, text: Path) -> None:
    (tmp_path / "short.txt").write_text("a" * 50)
    out = tmp_path / "out"
    refused("quantize", source, out, "--calibration", tmp_path / "short.txt", *QUICK)
    assert llm_fp4("quantize", source, out, "--calibration", text, *QUICK).exit_code == 0


@pytest.fixture
def gguf_file(tmp_path: Path, tiny_llama: Any) -> Path:
    """Return a tiny LLaMA as a GGUF file."""
    gguf = pytest.importorskip("gguf")
    model = tiny_llama()
    config = model.config
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges([])
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight")
        if module in outer:
            target = outer[module]
        else:
            _, _, block, *rest = module.split(".")
            target = f"blk.{block}.{names['.'.join(rest)]}"
        writer.add_tensor(f"{target}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_is_read(llm_fp4: Any, gguf_file: Path) -> None:
    result = llm_fp4("inspect", gguf_file, "--json", "--quiet")
    assert len(json.loads(result.stdout)["layers"]) == 16
    assert result.stderr == ""  # dequantizing draws a bar of its own otherwise


def test_truncated_gguf(not_quantized: Refuse, gguf_file: Path) -> None:
    gguf_file.write_bytes(gguf_file.read_bytes()[:-20_000])
    sentence = not_quantized(gguf_file)
    assert "model.gguf" in sentence
    assert "truncated" in sentence


def test_gguf_with_hostile_sizes(not_quantized: Refuse, gguf_file: Path) -> None:
    data = gguf_file.read_bytes()
    at = data.index(b"llama.block_count") + len(b"llama.block_count") + 4  # a type, then the value
    gguf_file.write_bytes(data[:at] + (10**9).to_bytes(4, "little") + data[at + 4 :])
    assert "model.gguf" in not_quantized(gguf_file)


@pytest.mark.parametrize("content", [b"GGUF", b"GGUF" + b"\xff" * 200, b"not a gguf file at all"])
def test_corrupt_gguf(not_quantized: Refuse, tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "bad.gguf").write_bytes(content)
    assert "bad.gguf" in not_quantized(tmp_path / "bad.gguf")
