"""The Whisper example reads a CTranslate2 file of a known model back, weight for weight."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
SIZES = {
    "vocab_size": 260, "num_mel_bins": 80, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_source_positions": 1500, "max_target_positions": 448,
    "init_std": 0.2, "pad_token_id": 256, "bos_token_id": 256, "eos_token_id": 256, "decoder_start_token_id": 257,
}  # fmt: skip


@pytest.fixture
def whisper(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "whisper", raising=False)
    import whisper

    return whisper


def tensors_of(model: Any) -> dict[str, Tensor]:
    """Return the tensors of a Whisper under the names and in the shapes CTranslate2 has."""
    state, found = model.state_dict(), {}
    for kind in ("weight", "bias"):
        for i in (1, 2):
            found[f"encoder/conv{i}/{kind}"] = state[f"model.encoder.conv{i}.{kind}"]
    found["decoder/embeddings/weight"] = state["model.decoder.embed_tokens.weight"]
    for stack in ("encoder", "decoder"):
        found[f"{stack}/position_encodings/encodings"] = state[f"model.{stack}.embed_positions.weight"]
        found[f"{stack}/num_heads"] = torch.tensor(4, dtype=torch.int16)
        norms = {f"{stack}/layer_norm": f"model.{stack}.layer_norm"}
        for i in range(2):
            old, new = f"model.{stack}.layers.{i}", f"{stack}/layer_{i}"
            norms |= {
                f"{new}/self_attention/layer_norm": f"{old}.self_attn_layer_norm",
                f"{new}/ffn/layer_norm": f"{old}.final_layer_norm",
            }
            own, other = f"{old}.self_attn", f"{old}.encoder_attn"
            for kind in ("weight", "bias"):

                def get(name: str, kind: str = kind) -> Tensor:
                    found: Tensor = state.get(f"{name}.{kind}", torch.zeros(32))  # a key has no bias
                    return found

                found[f"{new}/self_attention/linear_0/{kind}"] = torch.cat([get(f"{own}.{p}_proj") for p in "qkv"])
                found[f"{new}/self_attention/linear_1/{kind}"] = get(f"{own}.out_proj")
                if stack == "decoder":
                    norms[f"{new}/attention/layer_norm"] = f"{old}.encoder_attn_layer_norm"
                    found[f"{new}/attention/linear_0/{kind}"] = get(f"{other}.q_proj")
                    found[f"{new}/attention/linear_1/{kind}"] = torch.cat([get(f"{other}.{p}_proj") for p in "kv"])
                    found[f"{new}/attention/linear_2/{kind}"] = get(f"{other}.out_proj")
                for n in (0, 1):
                    found[f"{new}/ffn/linear_{n}/{kind}"] = get(f"{old}.fc{n + 1}")
        for new, old in norms.items():
            found[f"{new}/gamma"], found[f"{new}/beta"] = state[f"{old}.weight"], state[f"{old}.bias"]
    return found


def write(path: Path, tensors: dict[str, Tensor], version: int = 6) -> None:
    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    parts = [struct.pack("<I", version), text("WhisperSpec"), struct.pack("<II", 3, len(tensors))]
    for name, tensor in tensors.items():
        stored = tensor.detach().half() if tensor.is_floating_point() else tensor
        data, kind = stored.contiguous().numpy().tobytes(), 4 if tensor.is_floating_point() else 2
        shape = struct.pack("<B", tensor.dim()) + b"".join(struct.pack("<I", n) for n in tensor.shape)
        parts += [text(name), shape, struct.pack("<BI", kind, len(data)), data]
    parts += [struct.pack("<I", 1), text("decoder/projection/weight"), text("decoder/embeddings/weight")]
    path.write_bytes(b"".join(parts))


@pytest.fixture
def package(tmp_path: Path) -> tuple[Path, Any]:
    """Return a CTranslate2 directory and the transformers model it was written from, its weights float16 numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    folder = tmp_path / "ct2"
    folder.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = WhisperForConditionalGeneration(WhisperConfig(**SIZES)).eval()
    for p in model.parameters():
        p.data = p.data.half().float()
    pieces = {p: i for i, p in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=pieces, merges=[]))
    core.add_special_tokens(SPECIAL)
    core.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(
        json.dumps({"suppress_ids": [1, 2], "suppress_ids_begin": [3], "alignment_heads": [[0, 0]]})
    )
    write(folder / "model.bin", tensors_of(model))
    return folder, model


def test_whisper_computes_what_it_computed_before(whisper: Any, package: tuple[Path, Any], tmp_path: Path) -> None:
    from transformers import AutoFeatureExtractor, AutoTokenizer, WhisperForConditionalGeneration

    source, expected = package
    out = whisper.convert(source, tmp_path / "out")
    model = WhisperForConditionalGeneration.from_pretrained(out)
    sound = AutoFeatureExtractor.from_pretrained(out)(torch.randn(16000).numpy(), sampling_rate=16000, return_tensors="pt")
    ids = torch.tensor([[257, 258, 5, 9]])
    with torch.no_grad():
        a, b = (m(**sound, decoder_input_ids=ids).logits for m in (model, expected))
    assert torch.equal(a, b)
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids(SPECIAL) == [256, 257, 258]
    assert model.generation_config.no_timestamps_token_id == 258


def test_another_version_is_refused(whisper: Any, package: tuple[Path, Any], tmp_path: Path) -> None:
    source, model = package
    write(source / "model.bin", tensors_of(model), version=5)
    with pytest.raises(SystemExit, match="of version 5, not 6"):
        whisper.convert(source, tmp_path / "out")
