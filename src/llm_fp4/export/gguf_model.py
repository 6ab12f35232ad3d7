"""What a GGUF file says of a model and its tokenizer: LLaMA, which llama.cpp was seen to run, and its close relatives, which were not tried."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_fp4.errors import UnsupportedError

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def architecture(config: dict[str, Any]) -> str:
    """Return llama.cpp's name of a model's architecture.

    Raises:
        UnsupportedError: another architecture, or a scaling of rotary embeddings.
    """
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise UnsupportedError(f"gguf export knows {', '.join(ARCHITECTURES)}, not {kind}; use another target")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if (scaling := rope.get("rope_type", rope.get("type", "default"))) != "default":
        raise UnsupportedError(f"gguf export does not write the rotary scaling {scaling!r}; use another target")
    if config.get("attention_bias") and ARCHITECTURES[kind] == "qwen3":
        raise UnsupportedError("gguf has no place for qwen3's attention biases; use another target")
    return ARCHITECTURES[kind]


def add_hyperparameters(writer: Any, config: dict[str, Any]) -> None:
    """Write sizes and constants of the model."""
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float(rope.get("rope_theta", config.get("rope_theta", 10000.0))))
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(config["vocab_size"])


def rotary_rows(rows: Tensor, name: str, config: dict[str, Any]) -> Tensor:
    """Return the rows of a query or key projection in llama.cpp's order: it pairs neighbours where transformers pairs halves."""
    if ARCHITECTURES[config["model_type"]] != "llama" or not name.endswith(("q_proj", "k_proj")):
        return rows
    heads = config["num_attention_heads"]
    if name.endswith("k_proj"):
        heads = config.get("num_key_value_heads") or heads
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def add_tokenizer(writer: Any, folder: Path, vocabulary: int) -> None:
    """Write a byte-level BPE tokenizer.

    Raises:
        UnsupportedError: no tokenizer.json, or one of another kind.
    """
    import gguf

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UnsupportedError(f"{folder} holds no tokenizer.json, which a gguf file must contain; save the tokenizer there")
    data = json.loads(path.read_text(encoding="utf-8"))
    pre = _splitter(data.get("pre_tokenizer") or {})
    if data["model"].get("type", "BPE") != "BPE" or not data["model"].get("merges") or pre is None:
        raise UnsupportedError(f"{path} is no byte-level BPE that llama.cpp is known to split alike; use another target")
    added = {t["id"]: t for t in data.get("added_tokens", [])}
    tokens = {i: t for t, i in data["model"]["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    kinds = gguf.TokenType
    types = [
        kinds.UNUSED
        if i not in tokens
        else kinds.NORMAL
        if i not in added
        else kinds.CONTROL
        if added[i]["special"]
        else kinds.USER_DEFINED
        for i in range(vocabulary)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([tokens.get(i, f"[PAD{i}]") for i in range(vocabulary)])
    writer.add_token_types(types)
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocabulary).add_to_gguf(writer, quiet=True)


def _splitter(pre: dict[str, Any]) -> str | None:
    """Return llama.cpp's name for the way a tokenizer splits text before BPE, or None."""
    steps = pre.get("pretokenizers", [pre])
    kinds = [s.get("type") for s in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = steps[0]["pattern"].get("Regex", "")
        if r"|\p{N}{1,3}|" in pattern:
            return "llama-bpe"
        return "qwen2" if r"|\p{N}|" in pattern else None
    return None


def plain(tensor: Tensor) -> tuple[Tensor, str]:
    """Return a float tensor as GGUF keeps it without rounding, and its type: vectors and float32 in F32."""
    if tensor.dtype == torch.float16 and tensor.dim() > 1:
        return tensor, "F16"
    if tensor.dtype == torch.bfloat16 and tensor.dim() > 1:
        return tensor.contiguous().view(torch.uint8), "BF16"
    return tensor.float(), "F32"
