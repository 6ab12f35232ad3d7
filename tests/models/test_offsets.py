"""Input offsets, unsigned inputs and corrected biases on whole models: on disk as in memory, named in plan and manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llm_fp4
from llm_fp4.errors import CheckpointError, UnsupportedError
from llm_fp4.integrations.recognize import operands_of
from llm_fp4.nn import QuantLinear
from llm_fp4.recipe import Recipe, load_recipe

from .families import batch, build, scores

RULES = Recipe.model_validate(
    {"inputs": {"offset": "mean", "unsigned": True}, "search": {"rounds": 1, "bias_correction": True, "sample_tokens": 64}}
)

NVFP4 = load_recipe("nvfp4").model_dump()
BLOCKS = Recipe.model_validate(
    {**NVFP4, "inputs": {**NVFP4["inputs"], "offset": "mean"}, "search": {**NVFP4["search"], "bias_correction": True}}
)
FAMILIES = [(f, RULES) for f in ("GPT-2", "ViT", "T5, head apart", "OPT", "BERT, tied head")]


@pytest.mark.parametrize(("family", "rules"), [*FAMILIES, ("ViT", BLOCKS), ("OPT", BLOCKS)])
def test_disk_equals_memory(family: str, rules: Recipe, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path / "float")
    data = batch(family)
    model = llm_fp4.load(llm_fp4.quantize(tmp_path / "float", tmp_path / "out", rules, batches=[data]))
    memory = llm_fp4.quantize_module(build(family), [data], rules)
    with torch.no_grad():
        ours, expected, flat = (scores(m(**data)) for m in (model, memory, build(family)))
    assert torch.allclose(ours, expected, atol=1e-5 * float(expected.abs().max()))
    assert 0 < ((ours - flat).square().sum() / flat.square().sum()).item() < 0.6
    config, plan = (json.loads((tmp_path / "out" / n).read_text()) for n in ("config.json", "plan.json"))
    modules = config["quantization_config"]["modules"]
    float_biases = {
        n.removesuffix(".bias") for n, _ in build(family).named_parameters(remove_duplicate=False) if n.endswith(".bias")
    }
    gained = {n for n, m in modules.items() if m.get("added_bias")}
    linears = {n for n, m in modules.items() if m["kind"] == "linear"}
    assert gained == linears - float_biases
    assert {n for n, w in plan["weights"].items() if w.get("added_bias")} == gained
    shifted = {n for n, m in modules.items() if m.get("input", {}).get("offset")}
    assert shifted == {n for n, m in model.named_modules() if getattr(m, "input_offset", None) is not None}
    assert shifted
    assert all("subtracted" in s["reason"] for s in plan["inputs"].values() if s.get("offset"))


def test_relu_inputs_are_unsigned_and_named(tmp_path: Path) -> None:
    build("OPT").save_pretrained(tmp_path / "float")
    rules = Recipe.model_validate({"inputs": {"unsigned": True}, "search": {"rounds": 1}})
    llm_fp4.quantize(tmp_path / "float", tmp_path / "out", rules, batches=[batch("OPT")])
    layers = {layer.name: layer for layer in llm_fp4.inspect_model(tmp_path / "out").layers}
    after_relu = layers["model.decoder.layers.0.fc2"]
    assert after_relu.input[0].startswith("ue")
    assert "never negative" in after_relu.reason
    assert layers["model.decoder.layers.0.fc1"].input[0].startswith("e")


def test_a_killed_run_keeps_the_biases_it_folded(tmp_path: Path) -> None:
    build("T5, head apart").save_pretrained(tmp_path / "float")

    def killed(stage: str, done: int, total: int) -> None:
        if stage == "quantize" and done == 3:
            raise KeyboardInterrupt

    data = [batch("T5, head apart")]
    whole = llm_fp4.quantize(tmp_path / "float", tmp_path / "whole", RULES, batches=data)
    with pytest.raises(KeyboardInterrupt):
        llm_fp4.quantize(tmp_path / "float", tmp_path / "out", RULES, batches=data, progress=killed)
    out = llm_fp4.quantize(tmp_path / "float", tmp_path / "out", RULES, batches=data)
    for shard in sorted(whole.glob("*.safetensors")):
        assert shard.read_bytes() == (out / shard.name).read_bytes()


def test_a_bfloat16_model_keeps_its_folded_biases_in_float32(tmp_path: Path, tiny_llama: Callable[..., Any]) -> None:
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "float")
    tokens = torch.randint(2, 258, (2, 32), generator=torch.Generator().manual_seed(0))
    out = llm_fp4.quantize(tmp_path / "float", tmp_path / "out", RULES, tokens=tokens)
    tensors = {k: t for shard in out.glob("*.safetensors") for k, t in load_file(shard).items()}
    assert tensors["model.layers.0.mlp.down_proj.bias"].dtype == torch.float32
    assert tensors["model.norm.weight"].dtype == torch.bfloat16
    logits = llm_fp4.load(out)(tokens).logits
    assert logits.dtype == torch.bfloat16
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("lost", ["input_offset", "bias"])
def test_a_missing_offset_or_bias_is_an_error(lost: str, tmp_path: Path) -> None:
    build("T5, head apart").save_pretrained(tmp_path / "float")
    out = llm_fp4.quantize(tmp_path / "float", tmp_path / "out", RULES, batches=[batch("T5, head apart")])
    index = json.loads((out / "model.safetensors.index.json").read_text())
    name = next(n for n in index["weight_map"] if n.endswith(f".{lost}"))
    shard = out / index["weight_map"].pop(name)
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({k: t for k, t in load_file(shard).items() if k != name}, shard)
    with pytest.raises(CheckpointError, match=f"lacks the tensor {name}"):
        llm_fp4.load(out)


def test_compiled_decoding_names_the_offset(tiny_llama: Callable[..., Any]) -> None:
    tokens = torch.randint(2, 258, (2, 32), generator=torch.Generator().manual_seed(0))
    model = llm_fp4.quantize_module(tiny_llama(), [tokens], RULES)
    where, owner = next(
        (n, model.get_submodule(n.rpartition(".")[0]))
        for n, m in model.named_modules()
        if isinstance(m, QuantLinear) and m.input_offset is not None
    )
    with pytest.raises(UnsupportedError, match="subtracts an offset from its input"):
        operands_of(owner, (where.rpartition(".")[2],), "x")
