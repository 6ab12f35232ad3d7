"""Encoders, vision towers, encoder-decoders: quantized on disk as in memory, resumable, with a reason for what stays float."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
import transformers

import llm_fp4
from llm_fp4.errors import RecipeError, UnsupportedError
from llm_fp4.nn import PackedModule
from llm_fp4.recipe import Recipe

from .families import FAMILIES, batch, build, scores

FAST = {"search": {"rounds": 1}}
RULES = Recipe.model_validate(FAST)


@pytest.mark.parametrize("family", FAMILIES)
def test_disk_equals_memory(family: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path / "float")
    data = batch(family)
    model = llm_fp4.load(llm_fp4.quantize(tmp_path / "float", tmp_path / "out", RULES, batches=[data]))
    memory = llm_fp4.quantize_module(build(family), [data], RULES)
    with torch.no_grad():
        ours, expected, flat = (scores(m(**data)) for m in (model, memory, build(family)))
    assert torch.allclose(ours, expected, atol=1e-5 * float(expected.abs().max()))
    assert 0 < ((ours - flat).square().sum() / flat.square().sum()).item() < 0.6
    inspection = llm_fp4.inspect_model(tmp_path / "float", RULES)
    packed = {n for n, m in model.named_modules() if isinstance(m, PackedModule)}
    assert {layer.name for layer in inspection.layers if layer.weight} == packed
    assert all(layer.reason for layer in inspection.layers if not layer.weight)


@pytest.mark.parametrize(("family", "propagation"), [("Whisper", "sequential"), ("T5", "parallel"), ("wav2vec2", "sequential")])
def test_a_killed_run_ends_with_the_same_bytes(family: str, propagation: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path / "float")
    data, rules = batch(family), Recipe.model_validate({"search": {"rounds": 1, "propagation": propagation}})

    def digest(folder: Path) -> dict[str, str]:
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}

    whole = digest(llm_fp4.quantize(tmp_path / "float", tmp_path / "whole", rules, batches=[data]))

    def killed(stage: str, done: int, total: int) -> None:
        if stage == "quantize" and stops and done == stops[0]:
            stops.pop(0)
            raise KeyboardInterrupt

    stops = [1, 2, 3]
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            llm_fp4.quantize(tmp_path / "float", tmp_path / "out", rules, batches=[data], progress=killed)
    assert digest(llm_fp4.quantize(tmp_path / "float", tmp_path / "out", rules, batches=[data], progress=killed)) == whole


def test_parallel_propagation_in_memory_is_that_on_disk(tmp_path: Path) -> None:
    rules, data = Recipe.model_validate({"search": {"rounds": 1, "propagation": "parallel"}}), batch("T5")
    build("T5").save_pretrained(tmp_path / "float")
    model = llm_fp4.load(llm_fp4.quantize(tmp_path / "float", tmp_path / "out", rules, batches=[data]))
    memory = llm_fp4.quantize_module(build("T5"), [data], rules)
    with torch.no_grad():
        assert torch.allclose(scores(model(**data)), scores(memory(**data)), atol=1e-5)


def test_embeddings_left_in_float_stay_tied_and_part_from_a_quantized_head(tmp_path: Path) -> None:
    data = batch("BART")
    build("BART").save_pretrained(tmp_path / "float")
    for name, fields in {"head": {"bits": {"embedding": 16}}, "none": {"bits": {"embedding": 16}, "ignore": ["lm_head"]}}.items():
        rules = Recipe.model_validate({**FAST, **fields})
        model = llm_fp4.load(llm_fp4.quantize(tmp_path / "float", tmp_path / name, rules, batches=[data]))
        flat = build("BART")
        assert torch.equal(model.model.encoder.embed_tokens.weight, flat.model.shared.weight)
        assert torch.equal(model.model.decoder.embed_tokens.weight, flat.model.shared.weight)
        assert torch.isfinite(scores(model(**data))).all()


def test_a_shared_table_is_stored_once(tmp_path: Path) -> None:
    build("T5").save_pretrained(tmp_path / "float")
    model = llm_fp4.load(llm_fp4.quantize(tmp_path / "float", tmp_path / "out", RULES, batches=[batch("T5")]))
    owners = {
        m.weight_packed.data_ptr() for m in (model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens, model.lm_head)
    }
    assert len(owners) == 1
    with pytest.raises(RecipeError, match="shares the weight of shared"):
        llm_fp4.inspect_model(tmp_path / "float", Recipe.model_validate({"ignore": ["encoder.embed_tokens"]}))


def test_a_tower_the_data_does_not_reach_is_an_error_unless_ignored(tmp_path: Path) -> None:
    text = {k: v for k, v in batch("CLIP").items() if k != "pixel_values"}
    model = build("CLIP").text_model
    assert llm_fp4.quantize_module(model, [text], RULES) is model

    class Either(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clip = build("CLIP")

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.clip.text_model(input_ids, attention_mask).last_hidden_state

    with pytest.raises(
        UnsupportedError, match=r"did not run on the calibration data.*--ignore 'clip.vision_model.encoder.layers.\*'"
    ):
        llm_fp4.quantize_module(Either(), [text], RULES)
    ignore = ["clip.vision_model.*", "*_projection"]
    quantized = llm_fp4.quantize_module(Either(), [text], Recipe.model_validate({**FAST, "ignore": ignore}))
    assert not any(isinstance(m, PackedModule) for m in quantized.clip.vision_model.modules())


def test_layers_named_that_stay_in_float_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"projection stays in float: it is a convolution"):
        llm_fp4.quantize_module(build("ViT"), [batch("ViT")], Recipe.model_validate({"targets": ["*.projection"]}))
    with pytest.raises(UnsupportedError, match="position_embeddings stays in float"):
        llm_fp4.quantize_module(build("BERT"), [batch("BERT")], Recipe.model_validate({"targets": ["position_embeddings"]}))


def test_blocks_that_are_used_again_are_refused() -> None:
    config = transformers.AlbertConfig(
        vocab_size=96, embedding_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    with pytest.raises(UnsupportedError, match="runs more than once in a forward pass"):
        llm_fp4.quantize_module(transformers.AlbertModel(config), [batch("BERT")], RULES)


def test_a_block_that_reads_further_back_is_refused() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(8, 8)) for _ in range(3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.blocks[0](x)
            second = self.blocks[1](first)
            out: torch.Tensor = self.blocks[2](first + second)
            return out

    with pytest.raises(UnsupportedError, match=r"blocks.2 reads outputs of several blocks before it"):
        llm_fp4.quantize_module(Model(), [torch.randn(16, 8)], Recipe.model_validate({**FAST, "bits": {"embedding": 16}}))
