"""Mixed widths: the budget is kept and spent where it helps, the choice is explained, repeated, resumed, and refused where impossible."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llm_fp4
from llm_fp4.api import estimate, inspect_model
from llm_fp4.errors import RecipeError, UnsupportedError
from llm_fp4.recipe import Recipe, dump_recipe, load_recipe
from llm_fp4.search import Part, allocate


def recipe(limit: dict[str, Any], **fields: Any) -> Recipe:
    budget = {"choices": ["4/4", "4/8", "8/4", "8/8"], "tokens": 64, **limit}
    return Recipe.model_validate({"search": {"rounds": 1, "sample_tokens": 64}, "budget": budget, **fields})


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(2, 258, (4, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def source(tmp_path: Path, tiny_llama: Callable[..., Any]) -> Path:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def plan_of(folder: Path) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads((folder / "plan.json").read_text())["budget"]
    return plan


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_more_bits_are_spent_within_the_budget_and_predicted_to_lose_less(tmp_path: Path, source: Path, tokens: Tensor) -> None:
    predicted = []
    for bits in (4.0, 4.5, 6.0, 8.0):
        out = llm_fp4.quantize(source, tmp_path / f"out-{bits}", recipe({"average_bits": bits}), tokens=tokens)
        plan, found = plan_of(out), inspect_model(out)
        assert found.average.weights == pytest.approx(plan["takes"]["weights"])
        assert found.average.inputs == pytest.approx(plan["takes"]["inputs"])
        assert bits - 0.5 < plan["takes"]["weights"] <= bits
        assert plan["takes"]["inputs"] <= bits
        predicted.append(plan["takes"]["kl"])
    assert predicted == sorted(predicted, reverse=True)
    assert predicted[-1] < 0.1 * predicted[0]  # every part at 8 bits


def test_the_choice_is_explained(tmp_path: Path, source: Path, tokens: Tensor) -> None:
    wish = recipe({"average_bits": 4.5})
    out = llm_fp4.quantize(source, tmp_path / "out", wish, tokens=tokens)
    plan = plan_of(out)
    table = {(row["kind"], row["name"]): row for row in plan["sensitivity"]}
    # two blocks of seven weights and four inputs, the head's weight and input, the embedding
    assert len(table) == 2 * 11 + 3
    worst = [max(row["losses"].values()) for row in plan["sensitivity"]]
    assert worst == sorted(worst, reverse=True)
    assert all(row["measured"] for row in table.values())
    assert len(plan["kept_high"]) == 5
    for kept in plan["kept_high"]:
        assert kept["bits"] == table[kept["kind"], kept["name"]]["bits"] == 8
        assert kept["why"].startswith("8 bits: at 4 bits this")
    # weights and inputs have a budget each: no part that stayed at 4 bits would save more than one kept high of no fewer elements
    for row in (r for r in plan["sensitivity"] if r["bits"] == 4):
        kept = [table[k["kind"], k["name"]] for k in plan["kept_high"] if k["kind"] == row["kind"]]
        larger = [k["saved"] for k in kept if k["elements"] >= row["elements"]]
        assert all(row["losses"]["4"] - row["losses"]["8"] <= saved for saved in larger), row["name"]
    assert load_recipe(str(out / "recipe.yaml")) == wish
    assert json.loads((out / "config.json").read_text())["quantization_config"]["bits"] == "4.5 bits on average"
    assert 5 < plan["forward_passes"] < 40


def test_a_measured_divergence_is_that_of_the_model_with_one_part_rounded(
    tmp_path: Path, source: Path, tokens: Tensor, tiny_llama: Callable[..., Any]
) -> None:
    """One weight is rounded outside the package's own runs; the fitted widths are near measured ones."""
    from llm_fp4.numerics import fake_quantize, parse, scale_of_max

    wish = recipe({"average_bits": 8.0}, weights={"formats": ["int"]}, method="minmax", inputs={"sinks": "static", "shift": False})
    plan = plan_of(llm_fp4.quantize(source, tmp_path / "out", wish, tokens=tokens))
    model = tiny_llama(tie_word_embeddings=True)
    with torch.no_grad():
        expected = model(tokens[::2]).logits.log_softmax(-1)  # 64 tokens: two of the four sequences
        for name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj"):
            row = next(r for r in plan["sensitivity"] if r["name"] == name and r["kind"] == "weight")
            weight = model.get_submodule(name).weight
            before = weight.detach().clone()
            for bits in (4, 8):
                fmt = parse(f"int{bits}")
                weight.copy_(fake_quantize(before, scale_of_max(before.abs().amax(1), fmt).unsqueeze(1), fmt))
                kl = float((expected.exp() * (expected - model(tokens[::2]).logits.log_softmax(-1))).sum(-1).mean())
                within = 1e-3 if bits in row["measured"] else 2.0
                assert row["losses"][str(bits)] == pytest.approx(kl, rel=within, abs=1e-6 if bits in row["measured"] else 0), bits
                weight.copy_(before)


@pytest.mark.parametrize("stop", [("sensitivity", 1), ("sensitivity", 3), ("quantize", 0), ("quantize", 2)])
def test_a_killed_run_decides_the_same(tmp_path: Path, source: Path, tokens: Tensor, stop: tuple[str, int]) -> None:
    wish = recipe({"average_bits": 4.5})
    whole = digest(llm_fp4.quantize(source, tmp_path / "whole", wish, tokens=tokens))

    def killed(stage: str, done: int, total: int) -> None:
        if stage == stop[0] and done >= stop[1]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm_fp4.quantize(source, tmp_path / "out", wish, tokens=tokens, progress=killed)
    seen: list[tuple[str, int]] = []
    out = llm_fp4.quantize(source, tmp_path / "out", wish, tokens=tokens, progress=lambda s, d, _: seen.append((s, d)))
    assert digest(out) == whole
    began = [done for stage, done in seen if stage == "sensitivity"]
    assert (not began) if stop[0] == "quantize" else (min(began) >= stop[1])  # what was measured is not measured again


def test_bytes_are_a_limit_and_codes_shared_with_the_embedding_count_once(tmp_path: Path, source: Path, tokens: Tensor) -> None:
    least, most = (estimate(source, recipe({"bytes": 1}).at(b, 8).model_copy(update={"budget": None})).bytes for b in (4, 8))
    limit = (2 * least + most) // 3
    out = llm_fp4.quantize(source, tmp_path / "out", recipe({"bytes": limit}), tokens=tokens)
    stored = json.loads((out / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    plan = plan_of(out)
    assert stored <= plan["takes"]["bytes"] <= limit
    assert plan["takes"]["bytes"] - stored < 1500  # channel shifts the search did without
    assert plan["takes"]["bytes"] > 0.95 * limit
    with pytest.raises(RecipeError, match=r"budget.bytes 1,000 cannot be met: the narrowest choices take [\d,]+ bytes"):
        llm_fp4.quantize(source, tmp_path / "other", recipe({"bytes": 1000}), tokens=tokens)


def test_a_divergence_is_reached_with_the_fewest_bits(tmp_path: Path, source: Path, tokens: Tensor) -> None:
    every = plan_of(llm_fp4.quantize(source, tmp_path / "a", recipe({"average_bits": 4.0}), tokens=tokens))["takes"]["kl"]
    found = []
    for n, share in enumerate((0.6, 0.2)):
        plan = plan_of(llm_fp4.quantize(source, tmp_path / f"b{n}", recipe({"kl": share * every}), tokens=tokens))
        assert plan["takes"]["kl"] <= share * every
        found.append(plan["takes"]["weights"] + plan["takes"]["inputs"])
    assert 8 < found[0] < found[1] < 16
    with pytest.raises(RecipeError, match="the widest choices take a predicted divergence of"):
        llm_fp4.quantize(source, tmp_path / "c", recipe({"kl": 1e-9}), tokens=tokens)


def test_choices_and_overrides_hold(tmp_path: Path, source: Path, tokens: Tensor) -> None:
    pins = [{"targets": ["k_proj"], "weight_bits": 6}, {"targets": ["down_proj"], "activation_bits": 8}]
    wish = recipe({"average_bits": 6.5, "choices": ["4/4", "8/8"]}, bits={"embedding": 16}, overrides=pins, ignore=["o_proj"])
    out = llm_fp4.quantize(source, tmp_path / "out", wish, tokens=tokens)
    layers = {layer.name: layer for layer in inspect_model(out).layers if layer.weight}
    assert "model.embed_tokens" not in layers
    assert not any(name.endswith("o_proj") for name in layers)
    widths = {}
    for name, layer in layers.items():
        widths[name] = tuple(llm_fp4.FloatFormat(int(f[1]), int(f[3])).bits for (f,) in (layer.weight, layer.input))
    for name, (weight, read) in widths.items():
        if name.endswith("k_proj"):
            assert weight == 6
        elif name.endswith("down_proj"):
            assert read == 8
        else:
            assert weight == read  # 4/8 and 8/4 are no choices
    assert {w for name, w in widths.items() if name.endswith(("q_proj", "v_proj", "gate_proj", "up_proj"))} == {(4, 4), (8, 8)}


@pytest.mark.parametrize("name", ["balanced", "nvfp4", "minmax-fp"])
def test_works_beside_other_recipes(tmp_path: Path, source: Path, tokens: Tensor, name: str) -> None:
    data = load_recipe(name).model_dump()
    data["weights"]["formats"] = data["inputs"]["formats"] = None
    data |= {"budget": {"average_bits": 4.6, "choices": ["4/4", "4/8", "8/8"], "tokens": 64}}
    data["search"] |= {"rounds": 1, "sweeps": 1, "starts": 1}
    out = llm_fp4.quantize(source, tmp_path / "out", Recipe.model_validate(data), tokens=tokens)
    plan = plan_of(out)
    assert 4 < plan["takes"]["weights"] <= 4.6
    assert 4 < plan["takes"]["inputs"] <= 4.6
    assert torch.isfinite(llm_fp4.load(out)(tokens).logits).all()


def test_a_model_in_memory(tiny_llama: Callable[..., Any], tokens: Tensor) -> None:
    model = tiny_llama()
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(RecipeError, match="average_bits 3 cannot be met: no choice gives weights fewer than 4 bits"):
        llm_fp4.quantize_module(model, [tokens], recipe({"average_bits": 3.0}))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    llm_fp4.quantize_module(model, [tokens], recipe({"average_bits": 5.0}))
    found = {m.weight_format.bits for m in model.modules() if hasattr(m, "weight_format")}
    assert found == {4, 8}


def test_a_model_without_logits_is_refused() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.up(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block() for _ in range(2)])

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            for block in self.blocks:
                x = block(x)
            return (x,)

    with pytest.raises(UnsupportedError, match="Model gives no logits of two classes or more"):
        llm_fp4.quantize_module(Model(), [torch.randn(8, 16)], recipe({"average_bits": 5.0}))


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "give one of average_bits, bytes and kl"),
        ({"average_bits": 4.5, "kl": 0.1}, "give one of average_bits, bytes and kl"),
        ({"average_bits": 4.5, "choices": ["4"]}, "'4' is no pair"),
        ({"average_bits": 4.5, "choices": ["16/4"]}, "16/4 is not possible"),
    ],
)
def test_what_is_no_budget(tmp_path: Path, budget: dict[str, Any], message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"budget": budget}))
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(path))


def test_options_print_the_reasons(tmp_path: Path, source: Path, tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from llm_fp4.cli.inspect import inspect
    from llm_fp4.cli.options import recipe_of
    from llm_fp4.cli.quantize import quantize

    tiny_tokenizer.save_pretrained(source)
    text = tmp_path / "text.txt"
    text.write_text("The sea is wide and the ship sails on it, said the captain of old. " * 20)
    wish = recipe({"bytes": 1}, calibration={"source": str(text), "sequences": 2, "length": 32})
    (tmp_path / "wish.yaml").write_text(dump_recipe(wish))
    quantize(str(source), str(tmp_path / "out"), recipe=str(tmp_path / "wish.yaml"), average_bits=4.5, quiet=True)
    shown = capsys.readouterr().out
    assert "average bits" in shown
    assert "predicted divergence" in shown
    assert "of all parts at their narrowest" in shown
    inspect(str(tmp_path / "out"), quiet=True)
    assert "predicted divergence" in capsys.readouterr().out
    assert str(recipe_of(str(tmp_path / "wish.yaml"), max_kl=0.25).budget) == "a divergence of 0.25"


def test_pairs_that_fit_only_one_by_one_are_told() -> None:
    """Each mean alone could be 4, but only beside the other at 8."""
    losses = {4: 1.0, 8: 0.0}
    parts = [Part("input", "up", 8, losses), Part("weight", "up", 64, losses, site="up")]
    with pytest.raises(
        RecipeError, match=r"budget.average_bits 5 cannot be met for weights and inputs together.*allow narrower pairs"
    ):
        allocate(parts, [(4, 8), (8, 4)], {"average_bits": 5})
