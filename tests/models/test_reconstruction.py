"""Block-wise reconstruction: rounding learned by the block's error lowers it, survives kills, and leaves what engines read alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import llm_fp4
from llm_fp4.cli.main import app
from llm_fp4.recipe import Recipe, load_recipe

from .families import batch, build
from .test_experts import build as build_experts
from .test_experts import tokens as tokens_of


def recipe(preset: str = "fpq", **search: Any) -> Recipe:
    data = load_recipe(preset).model_dump()
    data["bits"] |= {"embedding": 16, "lm_head": 16}
    data["search"] |= {"rounds": 1, "reconstruction": "block", **search}
    return Recipe.model_validate(data)


class Mixed(nn.Module):
    """A model of one block whose inputs lie near a plane, so that errors of a row's values can make up for each other."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(24, 48), "down": nn.Linear(48, 24)})])
        self.layers[0].forward = self._run

    def _run(self, hidden: Tensor) -> Tensor:
        block = self.layers[0]
        return hidden + block["down"](torch.relu(block["up"](hidden)))

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.layers:
            hidden = block(hidden)
        return hidden


def near_a_plane(seed: int) -> Tensor:
    basis = torch.randn(3, 24, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 64, 3, generator=generator) @ basis + 0.1 * torch.randn(8, 64, 24, generator=generator)


@pytest.mark.parametrize("bits", [4, 16])
def test_it_lowers_the_error_on_new_data(bits: int) -> None:
    batches, new = [near_a_plane(i) for i in range(4)], near_a_plane(50)
    expected, errors = Mixed()(new).detach(), {}
    for how in ("none", "block"):
        wish = recipe(reconstruction=how, reconstruction_epochs=20)
        wish = wish.model_copy(update={"bits": wish.bits.model_copy(update={"activation": bits})})
        model = llm_fp4.quantize_module(Mixed(), batches, wish)
        errors[how] = float((model(new).detach() - expected).square().mean())
    assert errors["block"] < 0.8 * errors["none"]


@pytest.fixture
def tokens() -> Tensor:
    """Few different tokens: inputs near a plane, so that there is something to learn that holds for new data."""
    return torch.randint(2, 10, (16, 32), generator=torch.Generator().manual_seed(0))


def test_the_plan_tells_of_every_block_and_a_killed_run_ends_with_the_same_bytes(
    tmp_path: Path, spiked_llama: Callable[..., Any], tokens: Tensor
) -> None:
    spiked_llama().save_pretrained(tmp_path / "float")
    whole = llm_fp4.quantize(tmp_path / "float", tmp_path / "whole", recipe(), tokens=tokens)
    told = json.loads((whole / "plan.json").read_text())["reconstruction"]
    assert list(told) == ["model.layers.0", "model.layers.1"]
    assert all(entry["kept"] == (entry["after"] < entry["before"]) for entry in told.values())
    assert any(entry["kept"] for entry in told.values())
    said = CliRunner().invoke(app, ["inspect", str(whole)])
    assert f"learned in {sum(entry['kept'] for entry in told.values())} of 2 blocks, with 0." in said.output

    def killed(stage: str, done: int, total: int) -> None:
        if stage == "quantize" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm_fp4.quantize(tmp_path / "float", tmp_path / "out", recipe(), tokens=tokens, progress=killed)
    again = llm_fp4.quantize(tmp_path / "float", tmp_path / "out", recipe(), tokens=tokens)
    for file in sorted(whole.iterdir()):
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name
    memory = llm_fp4.quantize_module(spiked_llama(), [tokens], recipe())
    torch.testing.assert_close(memory(tokens).logits, llm_fp4.load(whole)(tokens).logits, rtol=1e-3, atol=1e-3)


def test_block_scales_stay_and_siblings_keep_sharing_the_float32(
    tmp_path: Path, tiny_llama: Callable[..., Any], tokens: Tensor
) -> None:
    layers = {}
    for how in ("none", "block"):
        model = llm_fp4.quantize_module(
            tiny_llama(), [tokens], recipe("nvfp4", reconstruction=how, reconstruction_epochs=4, compensation="none")
        )
        layers[how] = model.model.layers[0].self_attn
    before, after = layers["none"].q_proj, layers["block"].q_proj
    assert torch.equal(before.weight_scale.view(torch.uint8), after.weight_scale.view(torch.uint8))
    assert torch.equal(before.weight_global_scale, after.weight_global_scale)
    assert not torch.equal(before.weight_packed, after.weight_packed)
    siblings = [getattr(layers["block"], n) for n in ("q_proj", "k_proj", "v_proj")]
    assert len({float(m.weight_global_scale) for m in siblings}) == 1
    assert all(m.site is siblings[0].site is not None for m in siblings)


@pytest.mark.parametrize("family", ["GPT-2", "BERT", "ViT", "T5"])
def test_other_families_run(family: str) -> None:
    data = recipe(reconstruction_epochs=1)
    model = llm_fp4.quantize_module(build(family), [batch(family)] * 2, data)
    out = model(**batch(family))
    assert all(bool(torch.isfinite(x).all()) for x in out.values() if isinstance(x, Tensor))


def test_gradients_pass_quantized_attention_products(tiny_llama: Callable[..., Any], tokens: Tensor) -> None:
    codes = {}
    for how in ("none", "block"):
        data = recipe(reconstruction=how, reconstruction_epochs=4).model_dump()
        data["attention"]["bits"] = 4
        codes[how] = llm_fp4.quantize_module(tiny_llama(), [tokens], Recipe.model_validate(data)).model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        before, after = (getattr(codes[how], name) for how in ("none", "block"))
        assert not torch.equal(before.weight_packed, after.weight_packed), name
        assert not torch.equal(before.input_scale, after.input_scale)


def test_learned_maps_beside_it(spiked_llama: Callable[..., Any], tokens: Tensor) -> None:
    data = recipe("best", reconstruction_epochs=2).model_dump()
    data["transforms"]["epochs"] = 2
    model = llm_fp4.quantize_module(spiked_llama(), [tokens], Recipe.model_validate(data))
    assert bool(torch.isfinite(model(tokens).logits).all())


def test_parameters_gather_no_gradient(tiny_llama: Callable[..., Any], tokens: Tensor) -> None:
    model = llm_fp4.quantize_module(tiny_llama(), [tokens], recipe(reconstruction_epochs=1))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_padding_teaches_nothing(tiny_llama: Callable[..., Any], tokens: Tensor) -> None:
    mask = torch.ones_like(tokens)
    mask[:, 24:] = 0
    found = []
    for filler in (5, 77):
        ids = torch.where(mask.bool(), tokens, filler)
        batches = [{"input_ids": ids, "attention_mask": mask}]
        found.append(llm_fp4.quantize_module(tiny_llama(), batches, recipe(reconstruction_epochs=2)).model.layers[1].mlp.down_proj)
    same = (found[0].quantized.codes == found[1].quantized.codes).float().mean()
    assert float(same) > 0.99  # sums of floats may order a rounding the other way


def test_inputs_of_the_float_model_and_experts() -> None:
    model = llm_fp4.quantize_module(
        build_experts("Mixtral"), [tokens_of(1)], recipe(propagation="parallel", reconstruction_epochs=1)
    )
    assert bool(torch.isfinite(model(tokens_of(2)).logits).all())


@pytest.mark.parametrize("fields", [{"objective": "fisher"}, {"compensation": "gptaq"}])
def test_errors_of_other_kinds_are_refused_beside_it(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"search\.reconstruction"):
        recipe(**fields)
