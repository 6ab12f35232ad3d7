"""Tiny random models of the families that are no causal language models, and an input for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as t

VOCABULARY = 96
ENCODER = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
WIDE = {"initializer_range": 0.2}
SEQ2SEQ = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "init_std": 0.2,
}  # fmt: skip
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}

FAMILIES: dict[str, tuple[str, Callable[[], Any], str]] = {
    "GPT-2": ("GPT2LMHeadModel", lambda: t.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, **WIDE), "text"),
    "OPT": (
        "OPTForCausalLM",
        lambda: t.OPTConfig(
            **{**ENCODER, "intermediate_size": 48}, ffn_dim=48, word_embed_proj_dim=16, max_position_embeddings=64, pad_token_id=1,
            bos_token_id=2, eos_token_id=2,
        ),
        "text",
    ),
    "BERT": ("BertModel", lambda: t.BertConfig(**ENCODER, **WIDE), "masked"),
    "BERT, tied head": ("BertForMaskedLM", lambda: t.BertConfig(**ENCODER, **WIDE), "masked"),
    "RoBERTa": ("RobertaForSequenceClassification", lambda: t.RobertaConfig(**ENCODER, **WIDE, max_position_embeddings=64), "masked"),
    "DistilBERT": (
        "DistilBertForSequenceClassification",
        lambda: t.DistilBertConfig(vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=48, **WIDE),
        "masked",
    ),
    "ViT": ("ViTForImageClassification", lambda: t.ViTConfig(**VISION, **WIDE, num_labels=7), "image"),
    "DeiT": ("DeiTForImageClassification", lambda: t.DeiTConfig(**VISION, **WIDE, num_labels=7), "image"),
    "Swin": (
        "SwinForImageClassification",
        lambda: t.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, **WIDE, num_labels=7),
        "image",
    ),
    "CLIP": (
        "CLIPModel",
        lambda: t.CLIPConfig(
            text_config={**ENCODER, **WIDE, "eos_token_id": 95, "bos_token_id": 0}, vision_config={**VISION, **WIDE}, projection_dim=16
        ),
        "both",
    ),
    "Whisper": (
        "WhisperForConditionalGeneration",
        lambda: t.WhisperConfig(
            **SEQ2SEQ, num_mel_bins=8, max_source_positions=20, max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1,
        ),
        "speech",
    ),
    "T5": ("T5ForConditionalGeneration", lambda: t.T5Config(**T5), "translation"),
    "T5, head apart": (
        "T5ForConditionalGeneration",
        lambda: t.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        "translation",
    ),
    "BART": ("BartForConditionalGeneration", lambda: t.BartConfig(**SEQ2SEQ, max_position_embeddings=64, scale_embedding=True), "translation"),
    "wav2vec2": (
        "Wav2Vec2ForCTC",
        lambda: t.Wav2Vec2Config(
            **ENCODER, **WIDE, conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
            num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, mask_time_prob=0.0,
        ),
        "wave",
    ),
}  # fmt: skip


def build(family: str) -> Any:
    """Return the random model of a family, the same at every call."""
    name, config, _ = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(t, name)(config()).eval()


def batch(family: str) -> dict[str, torch.Tensor]:
    """Return one input of a family's kind."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (4, 24), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -5:] = 0
    pixels = torch.randn(4, 3, 32, 32, generator=generator)
    kinds = {
        "text": {"input_ids": ids},
        "masked": {"input_ids": ids, "attention_mask": mask},
        "image": {"pixel_values": pixels},
        "both": {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels},
        "speech": {"input_features": torch.randn(4, 8, 40, generator=generator), "decoder_input_ids": ids},
        "translation": {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :10]},
        "wave": {"input_values": torch.randn(2, 400, generator=generator)},
    }
    return kinds[FAMILIES[family][2]]


def scores(output: Any) -> torch.Tensor:
    """Return what a model's output is about: logits, image scores or the last hidden states."""
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            found: torch.Tensor = getattr(output, name).detach()
            return found
    raise AssertionError(type(output))
