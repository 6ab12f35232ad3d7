"""The loop from model to checkpoint: what is stored, what is shared, and that a killed run ends with the same bytes."""

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
from llm_fp4.api import load_any
from llm_fp4.errors import CalibrationError, NonFiniteError, OutputError, RecipeError, UnsupportedError
from llm_fp4.nn import QuantEmbedding, QuantLinear
from llm_fp4.recipe import Bits, Recipe, load_recipe

FAST = {"rounds": 1}


def recipe(bits: str = "4/4/4", **fields: Any) -> Recipe:
    return Recipe.model_validate({"bits": Bits.parse(bits), "search": FAST, **fields})


@pytest.fixture
def source(tmp_path: Path, tiny_llama: Callable[..., Any]) -> Path:
    folder = tmp_path / "float"
    tiny_llama(tie_word_embeddings=True).save_pretrained(folder)
    return folder


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(2, 258, (6, 32), generator=torch.Generator().manual_seed(0))


def test_a_tied_head_behind_a_transform_has_codes_of_its_own(tmp_path: Path, source: Path, tokens: Tensor) -> None:
    wish = recipe("8/8/8", overrides=[{"targets": ["lm_head"], "input_transform": "hadamard"}])
    out = llm_fp4.quantize(source, tmp_path / "out", wish, tokens=tokens)
    plan = json.loads((out / "plan.json").read_text())
    assert plan["weights"]["lm_head"]["error"] < 0.01
    assert "tied_to" not in plan["weights"]["lm_head"]
    flat = load_any(source).model(tokens).logits.log_softmax(-1).detach()
    ours = llm_fp4.load(out)(tokens).logits.log_softmax(-1).detach()
    assert float(torch.nn.functional.kl_div(ours, flat, log_target=True, reduction="none").sum(-1).mean()) < 0.2


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("search", [{}, {"propagation": "parallel"}, {"compensation": "gptaq"}])
def test_a_run_killed_after_any_unit_ends_with_the_same_bytes(
    tmp_path: Path, source: Path, tokens: Tensor, search: dict[str, Any]
) -> None:
    rules = recipe(search={**FAST, **search})
    whole = digest(llm_fp4.quantize(source, tmp_path / "whole", rules, tokens=tokens))
    for stop in range(1, 4):

        def killed(stage: str, done: int, total: int, stop: int = stop) -> None:
            if stage == "quantize" and done == stop:
                raise KeyboardInterrupt

        out = tmp_path / f"stopped-{stop}"
        with pytest.raises(KeyboardInterrupt):
            llm_fp4.quantize(source, out, rules, tokens=tokens, progress=killed)
        assert not out.exists()
        seen: list[tuple[str, int]] = []

        def watch(stage: str, done: int, total: int, seen: list[tuple[str, int]] = seen) -> None:
            seen.append((stage, done))

        llm_fp4.quantize(source, out, rules, tokens=tokens, progress=watch)
        assert min(done for stage, done in seen if stage == "quantize") == stop  # finished units are not done again
        assert digest(out) == whole
        assert not out.with_name(f"{out.name}.partial").exists()


def test_tied_codes_are_stored_once(tmp_path: Path, source: Path, tokens: Tensor) -> None:
    out = llm_fp4.quantize(source, tmp_path / "out", recipe(), tokens=tokens)
    names = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert "model.embed_tokens.weight_packed" in names
    assert "lm_head.input_scale" in names
    assert "lm_head.weight_packed" not in names
    model = llm_fp4.load(out)
    assert isinstance(model.lm_head, QuantLinear)
    assert model.lm_head.weight_packed.data_ptr() == model.model.embed_tokens.weight_packed.data_ptr()


@pytest.mark.parametrize(
    ("bits", "fields", "embedding", "head"),
    [
        ("16/4/4", {}, nn.Embedding, QuantLinear),
        ("4/4/4", {"ignore": ["lm_head"]}, QuantEmbedding, nn.Linear),
        ("16/4/4", {"ignore": ["lm_head"]}, nn.Embedding, nn.Linear),
        ("8/4/4", {}, QuantEmbedding, QuantLinear),
    ],
)
def test_tied_weights_part_where_they_must(
    tmp_path: Path, source: Path, tokens: Tensor, bits: str, fields: dict[str, Any], embedding: type, head: type
) -> None:
    model = llm_fp4.load(llm_fp4.quantize(source, tmp_path / "out", recipe(bits, **fields), tokens=tokens))
    assert type(model.model.embed_tokens) is embedding
    assert type(model.lm_head) is head
    if embedding is nn.Embedding and head is nn.Linear:
        assert model.lm_head.weight is model.model.embed_tokens.weight
    if head is nn.Linear:
        assert torch.isfinite(model(tokens[:1]).logits).all()


def test_plan_tells_what_was_decided(tmp_path: Path, source: Path, tokens: Tensor) -> None:
    out = llm_fp4.quantize(source, tmp_path / "out", recipe(), tokens=tokens)
    plan = json.loads((out / "plan.json").read_text())
    site = plan["inputs"]["model.layers.0.self_attn.q_proj"]
    assert [n.rpartition(".")[2] for n in site["operands"]] == ["q_proj", "k_proj", "v_proj"]
    assert site["format"] in ("e1m2", "e2m1", "e3m0")
    assert 0 < site["error"] < 1
    assert load_recipe(str(out / "recipe.yaml")) == recipe()


def test_padding_never_enters_statistics(tiny_llama: Callable[..., Any], tokens: Tensor) -> None:
    rules = recipe("16/4/4")
    plain = llm_fp4.quantize_module(tiny_llama(), [tokens[:3], tokens[3:]], rules)
    padded_ids = torch.cat((tokens, torch.full((6, 9), 5)), 1)
    mask = torch.cat((torch.ones_like(tokens), torch.zeros(6, 9, dtype=torch.long)), 1)
    padded = llm_fp4.quantize_module(
        tiny_llama(), [{"input_ids": padded_ids[i], "attention_mask": mask[i]} for i in (slice(0, 3), slice(3, 6))], rules
    )
    unmasked = llm_fp4.quantize_module(tiny_llama(), [{"input_ids": padded_ids[i]} for i in (slice(0, 3), slice(3, 6))], rules)

    for (name, a), (_, b) in zip(plain.state_dict().items(), padded.state_dict().items(), strict=True):
        if name.endswith("input_scale"):
            assert torch.allclose(a, b, rtol=0.05), name  # attention over a mask rounds differently, no more
    other = unmasked.state_dict()
    scales = {n: t for n, t in plain.state_dict().items() if n.endswith("input_scale")}
    # padding would be seen
    assert any(n in other and not torch.allclose(t, other[n], rtol=0.05) for n, t in scales.items())


def test_quantize_module_works_on_any_module_with_blocks() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.relu(self.up(x)))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block() for _ in range(3)])
            self.out = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return self.out(x)

    torch.manual_seed(0)
    model, data = Model(), [torch.randn(8, 16) for _ in range(4)]
    expected = model(data[0])
    quantized = llm_fp4.quantize_module(model, iter(data), recipe("16/8/8"))
    assert isinstance(quantized.get_submodule("blocks.2.up"), QuantLinear)
    error = (quantized(data[0]) - expected).square().sum() / expected.square().sum()
    assert 0 < error.item() < 1e-2
    with pytest.raises(CalibrationError, match="no calibration batches"):
        llm_fp4.quantize_module(Model(), [], recipe())
    with pytest.raises(UnsupportedError, match="no list of repeated blocks"):
        llm_fp4.quantize_module(nn.Sequential(nn.Linear(4, 4)), data, recipe())


def test_an_error_leaves_a_module_as_it_was(tiny_llama: Callable[..., Any], tokens: Tensor) -> None:
    model = tiny_llama().bfloat16()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    bad = torch.nn.Parameter(torch.full_like(model.model.layers[1].mlp.down_proj.weight, float("nan")))
    model.model.layers[1].mlp.down_proj.weight = bad
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.down_proj"):
        llm_fp4.quantize_module(model, [tokens], recipe())
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)
    for n, t in model.state_dict().items():
        assert t.dtype == torch.bfloat16
        assert "layers.1.mlp.down_proj" in n or torch.equal(t, before[n]), n


def test_more_bits_lose_less(tmp_path: Path, source: Path, tokens: Tensor, tiny_llama: Callable[..., Any]) -> None:
    reference = tiny_llama(tie_word_embeddings=True)(tokens).logits.detach().log_softmax(-1)
    loss = {}
    for bits in ("4/4/4", "4/4/8", "8/8/8"):
        model = llm_fp4.load(llm_fp4.quantize(source, tmp_path / bits.replace("/", "-"), recipe(bits), tokens=tokens))
        loss[bits] = (reference.exp() * (reference - model(tokens).logits.log_softmax(-1))).sum(-1).mean().item()
    assert loss["8/8/8"] < loss["4/4/8"] < loss["4/4/4"]


def test_refusals_come_before_anything_is_written(tmp_path: Path, source: Path, tokens: Tensor) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        llm_fp4.quantize(source, tmp_path / "there", recipe(), tokens=tokens)
    with pytest.raises(RecipeError, match="matches no module"):
        llm_fp4.quantize(source, tmp_path / "out", recipe(ignore=["nothing_like_it"]), tokens=tokens)
    with pytest.raises(UnsupportedError, match="no layer to quantize"):
        llm_fp4.quantize(source, tmp_path / "out", recipe(ignore=["*"]), tokens=tokens)
    assert not (tmp_path / "out.partial").exists()


def test_an_unfinished_run_of_another_recipe_is_not_continued(tmp_path: Path, source: Path, tokens: Tensor) -> None:
    def killed(stage: str, done: int, total: int) -> None:
        if stage == "quantize" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm_fp4.quantize(source, tmp_path / "out", recipe(), tokens=tokens, progress=killed)
    with pytest.raises(OutputError, match="unfinished run with another recipe"):
        llm_fp4.quantize(source, tmp_path / "out", recipe("4/4/8"), tokens=tokens)


@pytest.mark.parametrize("transforms", [{}, {"rotation": "hadamard", "online": True}])
def test_asymmetric_compensation_reads_the_float_model_beside_the_quantized_one(
    tmp_path: Path, source: Path, tokens: Tensor, transforms: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows it is given are those that the float model has there, whatever was quantized before."""
    from llm_fp4.pipeline import sites

    seen: dict[str, Tensor] = {}
    search = sites.search_site

    def watch(name: str, weights: Any, statistics: Any, *rest: Any) -> Any:
        wanted = rest[-1]
        if wanted is not None:
            rows = torch.cat(list(wanted.chunks()))
            assert rows.shape == statistics.tokens.rows.shape
            seen[name] = rows @ next(iter(weights.values())).t()  # any transform of rows and weights cancels
        return search(name, weights, statistics, *rest)

    monkeypatch.setattr(sites, "search_site", watch)
    rules = recipe(search={**FAST, "compensation": "gptaq"}, transforms=transforms)
    llm_fp4.quantize(source, tmp_path / "out", rules, tokens=tokens)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    had: dict[str, list[Tensor]] = {}
    for name in seen:
        model.get_submodule(name).register_forward_hook(lambda _, __, out, n=name: had.setdefault(n, []).append(out.flatten(0, -2)))
    with torch.no_grad():
        model(tokens)
    assert {n.rpartition(".")[2] for n in seen} >= {"q_proj", "o_proj", "gate_proj", "down_proj", "lm_head"}
    for name, out in seen.items():
        if not transforms or not name.endswith(("o_proj", "down_proj")):  # those add to a stream that is rotated
            torch.testing.assert_close(out, torch.cat(had[name]), rtol=1e-3, atol=1e-3)


def test_asymmetric_compensation_of_a_model_in_memory(tmp_path: Path, source: Path, tokens: Tensor) -> None:
    from transformers import AutoModelForCausalLM

    rules = recipe("4/4/4", search={**FAST, "compensation": "gptaq"})
    stored = llm_fp4.load(llm_fp4.quantize(source, tmp_path / "out", rules, tokens=tokens))
    model = AutoModelForCausalLM.from_pretrained(source)
    model = llm_fp4.quantize_module(model, [{"input_ids": tokens}], rules)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, stored(tokens).logits, rtol=1e-3, atol=1e-3)
