"""Images, tables and speech from files: calibrated on with the model's own processor, and measured."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from PIL import Image

import llm_fp4
from llm_fp4 import api
from llm_fp4.errors import CalibrationError
from llm_fp4.evaluation import class_metrics, class_numbers, read_transcripts, score_metrics, top_k
from llm_fp4.recipe import Recipe

ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "initializer_range": 0.2}


def recipe(source: Path, **fields: Any) -> Recipe:
    eight = {"embedding": 8, "weight": 8, "activation": 8}
    return Recipe.model_validate(
        {"bits": eight, "search": {"rounds": 1}, "calibration": {"source": str(source), "sequences": 6}, **fields}
    )


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(8):
        pixels = torch.randint(0, 256, (40, 50, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return folder


def test_a_vision_model_from_a_folder_of_images(tmp_path: Path, images: Path) -> None:
    torch.manual_seed(0)
    t.ViTForImageClassification(t.ViTConfig(**ENCODER, image_size=32, patch_size=8, num_labels=7)).save_pretrained(tmp_path / "vit")
    t.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    out = llm_fp4.quantize(tmp_path / "vit", tmp_path / "out", recipe(images))
    assert (out / "preprocessor_config.json").is_file()
    (tmp_path / "labels.csv").write_text("file,class\n" + "".join(f"{i}.png,{i % 7}\n" for i in range(8)))
    model, flat = api.load_any(out), api.load_any(tmp_path / "vit")
    found = api.judge_images(model, images, tmp_path / "labels.csv", flat)
    assert found["float"].agreement == 1.0
    assert found["model"].n == 8
    assert found["model"].agreement is not None
    assert found["model"].agreement >= 0.5
    (tmp_path / "other.csv").write_text("x.png,1\n")
    with pytest.raises(CalibrationError, match="names no image"):
        api.judge_images(model, images, tmp_path / "other.csv")


@pytest.fixture
def bert(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    torch.manual_seed(0)
    tiny_tokenizer.pad_token = "</s>"
    for name, kind in {"encoder": t.BertModel, "classifier": t.BertForSequenceClassification}.items():
        kind(t.BertConfig(**ENCODER, vocab_size=260, max_position_embeddings=64)).save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


def test_encoders_from_a_table(bert: Path) -> None:
    table = bert / "pairs.tsv"
    table.write_text("sentence1\tsentence2\tlabel\n" + "".join(f"word {i}\tworld {i * i}\t{i / 2}\n" for i in range(10)))
    flat = api.judge_table(api.load_any(bert / "encoder"), table)
    ours = api.judge_table(api.load_any(llm_fp4.quantize(bert / "encoder", bert / "out", recipe(table))), table)
    assert ours["n"] == 10
    assert ours["spearman"] == pytest.approx(flat["spearman"], abs=0.2)
    table.write_text("a word\t0\nanother\t1\nthird\tLABEL_1\n")
    classes = api.judge_table(api.load_any(bert / "classifier"), table)
    assert set(classes) == {"accuracy", "matthews", "f1", "n"}
    table.write_text("a word\tunheard\n")
    with pytest.raises(CalibrationError, match="'unheard' is no class number"):
        api.judge_table(api.load_any(bert / "classifier"), table)


def test_speech_from_a_folder_of_waves(tmp_path: Path, tiny_tokenizer: Any) -> None:
    pytest.importorskip("jiwer")
    torch.manual_seed(0)
    config = t.WhisperConfig(
        vocab_size=260, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=80, max_source_positions=1500, max_target_positions=16, pad_token_id=1,
        bos_token_id=0, eos_token_id=1, decoder_start_token_id=0, init_std=0.2, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    t.WhisperForConditionalGeneration(config).save_pretrained(tmp_path / "whisper")
    t.WhisperFeatureExtractor().save_pretrained(tmp_path / "whisper")
    tiny_tokenizer.save_pretrained(tmp_path / "whisper")
    clips = tmp_path / "clips"
    clips.mkdir()
    for i in range(2):
        with wave.open(str(clips / f"{i}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16000)
            file.writeframes((torch.randn(4000) * 3000).short().numpy().tobytes())
    out = llm_fp4.quantize(tmp_path / "whisper", tmp_path / "out", recipe(clips))
    (tmp_path / "truth.tsv").write_text("0.wav\tsome words\n1.wav\tother words\n")
    found = api.judge_speech(api.load_any(out), clips, tmp_path / "truth.tsv")
    assert found["n"] == 2
    assert found["wer"] > 0
    assert set(found["texts"]) == {"0.wav", "1.wav"}


def test_metrics_are_those_of_their_definition() -> None:
    logits = torch.tensor([[9.0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]])
    found = top_k(logits, torch.tensor([0, 1]), logits)
    assert (found.top1, found.top5, found.agreement) == (0.5, 1.0, 1.0)
    metrics = class_metrics(torch.tensor([1, 1, 0, 0]), torch.tensor([1, 0, 0, 0]))
    assert metrics["accuracy"] == 0.75
    assert metrics["f1"] == pytest.approx(2 / 3)
    assert metrics["matthews"] == pytest.approx(0.5774, abs=1e-4)
    assert score_metrics(torch.tensor([1.0, 2, 9]), torch.tensor([0.0, 1, 2]))["spearman"] == 1.0
    assert class_numbers(["1", "no"], {"No": 0}).tolist() == [1, 0]


def test_transcripts_of_both_forms(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("<s> he was </s> (clip-1)\nclip-2.wav\tnot ill\n")
    assert read_transcripts(tmp_path / "a") == {"clip-1": "he was", "clip-2": "not ill"}
    (tmp_path / "a").write_text("no transcript\n")
    with pytest.raises(CalibrationError, match="line 1 is no transcript"):
        read_transcripts(tmp_path / "a")
