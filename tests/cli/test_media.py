"""``eval --images``, ``--table`` and ``--audio`` from the command line: tiny models quantized and measured on files."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from PIL import Image

ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "initializer_range": 0.2}
QUICK = ["--bits", "8/8/8", "--rounds", "1", "--sequences", "6", "--quiet"]


def of_json(result: Any) -> Any:
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return json.loads(result.stdout)


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """Return a folder with a float ViT ("model"), "images" and "labels.tsv"."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        t.ViTForImageClassification(t.ViTConfig(**ENCODER, image_size=32, patch_size=8, num_labels=7)).save_pretrained(
            tmp_path / "model"
        )
        t.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
        (tmp_path / "images").mkdir()
        for i in range(8):
            Image.fromarray(torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8).numpy()).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "labels.tsv").write_text("".join(f"{i}.png\t{i % 7}\n" for i in range(8)))
    return tmp_path


def test_images(llm_fp4: Any, refused: Any, vit: Path) -> None:
    source, images, labels = vit / "model", vit / "images", vit / "labels.tsv"
    result = llm_fp4("quantize", source, vit / "out", "--attention", "8", "--calibration", images, *QUICK)
    assert result.exit_code == 0, result.output
    asked = ["eval", vit / "out", "--images", images, "--labels", labels, "--reference", source, "--quiet"]
    found = of_json(llm_fp4(*asked, "--json"))["images"]
    assert found["float"]["agreement"] == 1.0
    assert found["model"]["n"] == 8
    assert 0 <= found["model"]["top1"] <= found["model"]["top5"] <= 1
    assert found["model"]["agreement"] >= 0.5
    assert of_json(llm_fp4(*asked, "--json", "--limit", "3"))["images"]["model"]["n"] == 3
    shown = llm_fp4(*asked).stdout
    assert "top-1" in shown
    assert "float reference" in shown
    result = llm_fp4("eval", vit / "out", "--images", images)
    assert result.exit_code == 2
    assert "--images needs --labels" in result.stderr
    assert "holds images, not audio" in refused("eval", vit / "out", "--audio", images, "--transcripts", labels, "--quiet")


def test_a_table(llm_fp4: Any, refused: Any, tmp_path: Path, tiny_tokenizer: Any) -> None:
    tiny_tokenizer.pad_token = "</s>"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, kind in {"encoder": t.BertModel, "classifier": t.BertForSequenceClassification}.items():
            kind(t.BertConfig(**ENCODER, vocab_size=260, max_position_embeddings=64)).save_pretrained(tmp_path / name)
            tiny_tokenizer.save_pretrained(tmp_path / name)
    pairs, classes = tmp_path / "pairs.tsv", tmp_path / "classes.csv"
    pairs.write_text("sentence1\tsentence2\tlabel\n" + "".join(f"word {i}\tworld {i * i}\t{i / 2}\n" for i in range(10)))
    classes.write_text("sentence,label\n" + "".join(f"a word {i * i},{i % 2}\n" for i in range(8)))
    for name, table in {"encoder": pairs, "classifier": classes}.items():
        result = llm_fp4("quantize", tmp_path / name, tmp_path / f"{name}-out", "--calibration", table, *QUICK)
        assert result.exit_code == 0, result.output
    scores = of_json(llm_fp4("eval", tmp_path / "encoder-out", "--table", pairs, "--json", "--quiet"))["table"]
    flat = of_json(llm_fp4("eval", tmp_path / "encoder", "--table", pairs, "--json", "--quiet"))["table"]
    assert scores["n"] == flat["n"] == 10
    assert scores["spearman"] == pytest.approx(flat["spearman"], abs=0.2)
    asked = ["eval", tmp_path / "classifier-out", "--table", classes, "--quiet"]
    assert set(of_json(llm_fp4(*asked, "--json"))["table"]) == {"accuracy", "matthews", "f1", "n"}
    assert "accuracy" in llm_fp4(*asked).stdout
    assert "no second sentence" in refused("eval", tmp_path / "encoder-out", "--table", classes, "--quiet")


def test_speech(llm_fp4: Any, refused: Any, tmp_path: Path, tiny_tokenizer: Any) -> None:
    pytest.importorskip("jiwer", reason="the word error rate needs jiwer")
    config = t.WhisperConfig(
        vocab_size=260, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=80, max_source_positions=1500, max_target_positions=16, pad_token_id=1,
        bos_token_id=0, eos_token_id=1, decoder_start_token_id=0, init_std=0.2, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    source, clips, truth = tmp_path / "whisper", tmp_path / "clips", tmp_path / "truth.tsv"
    clips.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        t.WhisperForConditionalGeneration(config).save_pretrained(source)
        for i in range(2):
            with wave.open(str(clips / f"{i}.wav"), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(16000)
                file.writeframes((torch.randn(4000) * 3000).short().numpy().tobytes())
    t.WhisperFeatureExtractor().save_pretrained(source)
    tiny_tokenizer.save_pretrained(source)
    truth.write_text("0.wav\tsome words\n1.wav\tother words\n")
    result = llm_fp4("quantize", source, tmp_path / "out", "--calibration", clips, *QUICK)
    assert result.exit_code == 0, result.output
    asked = ["eval", tmp_path / "out", "--audio", clips, "--transcripts", truth, "--quiet"]
    found = of_json(llm_fp4(*asked, "--json"))["audio"]
    assert found["n"] == 2
    assert found["wer"] > 0
    assert set(found["texts"]) == {"0.wav", "1.wav"}
    assert "wer" in llm_fp4(*asked).stdout
    truth.write_text("other.wav\tsome words\n")
    assert "has no transcript of a file" in refused(*asked)
