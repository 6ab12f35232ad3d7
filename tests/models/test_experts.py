"""Experts held as tensors of three axes: each matrix quantized, packed, loaded and run like any linear."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import llm_fp4
from llm_fp4.errors import UnsupportedError
from llm_fp4.nn import QuantLinear
from llm_fp4.recipe import Bits, Recipe

BASE = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "initializer_range": 0.2, "num_experts_per_tok": 2,
}  # fmt: skip
QWEN = {"head_dim": 8, "moe_intermediate_size": 24, "num_experts": 6, "shared_expert_intermediate_size": 24}
MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": QWEN,
    "Qwen2Moe": {**QWEN, "decoder_sparse_step": 1},
    "GptOss": {"head_dim": 8, "num_local_experts": 4, "pad_token_id": 0},  # stored transposed, with biases
}
RULES = Recipe.model_validate({"search": {"rounds": 1}, "inputs": {"sinks": "static"}})


def build(name: str, **fields: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**{**BASE, **MODELS[name], **fields})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def tokens(seed: int = 1, length: int = 24) -> torch.Tensor:
    return torch.randint(3, 96, (4, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(tokens(5), use_cache=False).logits
    return found


def experts_of(model: Any) -> dict[str, torch.nn.Module]:
    return {n: m for n, m in model.named_modules() if ".experts." in n and n.rpartition(".")[2].isdigit()}


@pytest.mark.parametrize("name", MODELS)
def test_disk_equals_memory(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "float")
    out = llm_fp4.quantize(tmp_path / "float", tmp_path / "out", RULES, batches=[tokens(1), tokens(2)])
    model = llm_fp4.load(out)
    memory = llm_fp4.quantize_module(build(name), [tokens(1), tokens(2)], RULES)
    ours, expected, flat = logits(model), logits(memory), logits(build(name))
    assert torch.allclose(ours, expected, atol=1e-4 * float(expected.abs().max()))
    assert 0 < ((ours - flat).square().sum() / flat.square().sum()).item() < 0.9
    count = 2 * 2 * (MODELS[name].get("num_local_experts") or MODELS[name]["num_experts"])
    packed = experts_of(model)
    assert len(packed) == count
    assert all(isinstance(m, QuantLinear) and m.exact for m in packed.values())  # on integers
    layers = {layer.name: layer for layer in llm_fp4.inspect_model(out).layers}
    assert all(layers[n].weight and layers[n].input for n in packed)
    planned = {layer.name for layer in llm_fp4.inspect_model(tmp_path / "float", RULES).layers if layer.weight}
    assert planned >= set(packed)
    plan = json.loads((out / "plan.json").read_text())
    assert {n for n in packed if plan["inputs"][n]["operands"] == [n]} == set(packed)  # a site each


def test_every_expert_s_weight_is_its_own_matrix(tmp_path: Path) -> None:
    for name in ("Mixtral", "GptOss"):
        rules = RULES.model_copy(update={"bits": Bits(embedding=16, weight=8, activation=16)})
        flat, model = build(name), llm_fp4.quantize_module(build(name), [tokens()], rules)
        assert ((logits(model) - logits(flat)).norm() / logits(flat).norm()).item() < 0.1
        whole = flat.model.layers[1].mlp.experts.down_proj[2].detach()
        expert = model.model.layers[1].mlp.experts.down_proj[2]
        matrix = whole.t() if name == "GptOss" else whole
        assert torch.allclose(expert.weight, matrix, atol=0.05 * float(matrix.abs().max()))


def test_an_expert_no_token_reaches_is_named(tmp_path: Path) -> None:
    model = build("Mixtral", num_local_experts=8, num_experts_per_tok=1)
    for block in model.model.layers:
        block.mlp.gate.weight.data[5] = block.mlp.gate.weight.data.mean(0)  # a mean is never above all of them
    model.save_pretrained(tmp_path / "float")
    few = [tokens(1, 4)]
    out = llm_fp4.quantize(tmp_path / "float", tmp_path / "out", RULES, batches=few)
    reasons = {layer.name: layer.reason for layer in llm_fp4.inspect_model(out).layers if ".experts." in layer.name}
    named = {n for n, reason in reasons.items() if "no calibration token reached this expert" in reason}
    assert "model.layers.0.mlp.experts.gate_up_proj.5" in named
    assert "model.layers.0.mlp.experts.down_proj.5" in named
    assert len(reasons) == 2 * 2 * 8
    assert named < set(reasons)
    memory = llm_fp4.quantize_module(model, few, RULES)
    assert torch.allclose(logits(llm_fp4.load(out)), logits(memory), atol=1e-4 * float(logits(memory).abs().max()))


def test_experts_reached_by_later_batches_only_are_calibrated_on_them(tmp_path: Path) -> None:
    batches = [tokens(seed, 2)[:1] for seed in range(12)]
    out = llm_fp4.quantize_module(build("Qwen3Moe"), batches, RULES)
    assert sum(isinstance(m, QuantLinear) for m in experts_of(out).values()) == 2 * 2 * 6


def test_ignored_experts_stay_whole_and_one_alone_stays_float(tmp_path: Path) -> None:
    build("Mixtral").save_pretrained(tmp_path / "float")
    for pattern, kept in (("experts", 0), ("*.experts.*", 0), ("*.experts.down_proj.1", 2)):
        rules = RULES.model_copy(update={"ignore": [pattern]})
        folder = tmp_path / str(abs(hash(pattern)))
        model = llm_fp4.load(llm_fp4.quantize(tmp_path / "float", folder, rules, batches=[tokens()]))
        memory = llm_fp4.quantize_module(build("Mixtral"), [tokens()], rules)
        assert torch.allclose(logits(model), logits(memory), atol=1e-4 * float(logits(memory).abs().max()))
        inspected = [*llm_fp4.inspect_model(folder).layers, *llm_fp4.inspect_model(tmp_path / "float", rules).layers]
        whole = [layer.name for layer in inspected if "experts" in layer.name and not layer.weight and layer.reason]
        assert len(whole) == (
            2 * 2 + 2 if kept == 0 else 2 + 2
        )  # tensors of the checkpoint and modules of the model, or one expert of each
        floats = [n for n, m in experts_of(model).items() if not isinstance(m, QuantLinear)]
        assert len(floats) == kept
        assert isinstance(model.model.layers[0].mlp.experts.gate_up_proj, torch.nn.Parameter) == (kept == 0)


def test_an_error_leaves_the_model_as_it_was() -> None:
    model, flat = build("Mixtral"), build("Mixtral")
    with pytest.raises(UnsupportedError):
        llm_fp4.quantize_module(model, [tokens()], RULES.model_copy(update={"ignore": ["*"]}))

    def fail(module: torch.nn.Module, args: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].mlp.gate.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        llm_fp4.quantize_module(model, [tokens()], RULES)
    hook.remove()
    assert torch.equal(logits(model), logits(flat))
    assert set(model.state_dict()) == set(flat.state_dict())
    assert model.config._experts_implementation == flat.config._experts_implementation


def test_a_killed_run_continues_with_the_same_bytes(tmp_path: Path) -> None:
    build("Mixtral").save_pretrained(tmp_path / "float")

    def killed(stage: str, done: int, total: int) -> None:
        if stage == "quantize" and done == 2:
            raise KeyboardInterrupt

    whole = llm_fp4.quantize(tmp_path / "float", tmp_path / "whole", RULES, batches=[tokens()])
    with pytest.raises(KeyboardInterrupt):
        llm_fp4.quantize(tmp_path / "float", tmp_path / "out", RULES, batches=[tokens()], progress=killed)
    out = llm_fp4.quantize(tmp_path / "float", tmp_path / "out", RULES, batches=[tokens()])
    for file in whole.iterdir():
        assert file.read_bytes() == (out / file.name).read_bytes()


def test_files_that_hold_fused_experts_are_read_matrix_by_matrix(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = build("GptOss")
    model.save_pretrained(tmp_path / "float")
    for old in (tmp_path / "float").glob("*.safetensors"):
        old.unlink()
    save_file({k: t.clone() for k, t in model.state_dict().items()}, tmp_path / "float" / "model.safetensors")
    opened = llm_fp4.models.open_model(str(tmp_path / "float"))
    assert type(opened.source).__name__ == "LazyFiles"
    loaded = llm_fp4.load(llm_fp4.quantize(opened, tmp_path / "out", RULES, batches=[tokens()]))
    memory = llm_fp4.quantize_module(build("GptOss"), [tokens()], RULES)
    assert torch.allclose(logits(loaded), logits(memory), atol=1e-4 * float(logits(memory).abs().max()))
