"""Rotations are orthogonal, keep what a model computes, run after loading, and are refused where they would not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llm_fp4
from llm_fp4.errors import UnsupportedError
from llm_fp4.models import FloatModel, InMemory, find_structure, open_model
from llm_fp4.nn import QuantLinear
from llm_fp4.pipeline.rotating import rotated
from llm_fp4.recipe import Recipe
from llm_fp4.transforms import Rotation

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 260, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def build(kind: str, **config: Any) -> Any:
    """Return a random model whose norms have gains and whose biases, where it has any, are not zero."""
    import transformers

    torch.manual_seed(0)
    settings = getattr(transformers, f"{kind}Config")(**{**SIZES, **config})
    model = getattr(transformers, f"{kind}ForCausalLM")(settings).eval()
    for name, p in model.named_parameters():
        if p.dim() == 1:
            p.data = torch.rand_like(p) + 0.5 if "norm" in name else torch.randn_like(p) * 0.3
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(2, 258, (6, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("width", [1, 7, 8, 48, 576])
def test_is_orthogonal_and_random(width: int) -> None:
    q = Rotation(width, 3).right(torch.eye(width)).double()
    assert torch.allclose(q @ q.t(), torch.eye(width).double(), atol=1e-5)
    x = torch.randn(5, width)
    assert torch.allclose(Rotation(width, 3).left(x.t()), Rotation(width, 3).right(x).t(), atol=1e-5)
    assert torch.equal(Rotation(width, 3).right(x), Rotation(width, 3).right(x))
    if width > 1:
        assert not torch.allclose(Rotation(width, 4).right(torch.eye(width)).double(), q, atol=1e-2)


def test_one_outlier_channel_is_spread_over_all() -> None:
    x = torch.zeros(1, 576)
    x[0, 17] = 1.0
    assert float(Rotation(576, 0).right(x).abs().max()) < 0.2  # an even spread would be 1/24


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("Llama", {"tie_word_embeddings": True}), ("Llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
        ("Qwen2", {}), ("Qwen3", {"head_dim": 16}), ("Mistral", {"head_dim": 8}), ("Phi3", {"pad_token_id": 1}),
    ],
)  # fmt: skip
def test_the_float_function_stays(tmp_path: Path, tokens: Tensor, kind: str, config: dict[str, Any]) -> None:
    """Three blocks of weights read rotated compute what the float model computes; every weight is another."""
    model = build(kind, **config)
    model.save_pretrained(tmp_path)
    opened = open_model(str(tmp_path))
    structure = find_structure(opened.model)
    batch = {"input_ids": tokens, "use_cache": False}
    with torch.no_grad():
        source = rotated(opened.model, structure, opened.source, batch, CPU, 0)
        source.load(opened.model, "", CPU)
        expected, found = model(tokens).logits, opened.model(tokens).logits
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
    for name, p in opened.model.named_parameters():
        if p.dim() == 2:
            assert not torch.allclose(p, model.get_parameter(name), atol=1e-2), name
    # Phi3's values come out of one linear with queries and keys, which no rotation of heads reaches
    assert {n.rpartition(".")[2] for n in source.hidden} == {"down_proj"} | ({"o_proj"} if kind == "Phi3" else set())


@pytest.mark.parametrize(
    ("kind", "config", "reason"),
    [
        ("OPT", {"ffn_dim": 80, "word_embed_proj_dim": 48}, "reads the output of an RMSNorm"),
        ("Bloom", {"n_head": 4, "n_layer": 3}, "reads the output of an RMSNorm"),
        ("Gemma3", {"head_dim": 12, "sliding_window": 16}, "(embeddings|pre-norm block)"),
    ],
)
def test_other_models_are_refused_by_name(tmp_path: Path, tokens: Tensor, kind: str, config: dict[str, Any], reason: str) -> None:
    import transformers

    torch.manual_seed(0)
    name = f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config"
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, name)(**{**SIZES, **config})).eval()
    model.save_pretrained(tmp_path / "float")
    wish = Recipe.model_validate({"transforms": {"rotation": "hadamard"}, "search": {"rounds": 1}})
    with pytest.raises(UnsupportedError, match=f"{kind}ForCausalLM differs: .*{reason}"):
        llm_fp4.quantize(tmp_path / "float", tmp_path / "out", wish, tokens=tokens)
    assert not (tmp_path / "out").exists()


def recipe(bits: dict[str, int], online: bool = True, **fields: Any) -> Recipe:
    rules = {"rotation": "hadamard", "online": online}
    return Recipe.model_validate({"bits": bits, "transforms": rules, "search": {"rounds": 1}, **fields})


EIGHT = {"embedding": 8, "weight": 8, "activation": 8}


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("online", [False, True])
def test_a_rotated_checkpoint_runs(tmp_path: Path, tokens: Tensor, online: bool, in_memory: bool) -> None:
    reference = build("Llama", tie_word_embeddings=True)
    expected = reference(tokens).logits.detach()
    reference.save_pretrained(tmp_path / "float")
    source: Any = tmp_path / "float"
    if in_memory:
        source = FloatModel(reference, InMemory(reference), None, source, "a model in memory")
    out = llm_fp4.quantize(source, tmp_path / "out", recipe(EIGHT, online), tokens=tokens)
    model = llm_fp4.load(out)
    assert not model.config.tie_word_embeddings
    down = model.model.layers[1].mlp.down_proj
    assert isinstance(down, QuantLinear)
    assert down.spec is not None
    assert (down.spec.transform == "hadamard") == online
    assert model.model.layers[1].mlp.up_proj.spec.transform is None
    error = (model(tokens).logits.detach() - expected).square().mean() / expected.square().mean()
    assert 0 < float(error) < 0.02


def test_a_transform_without_rotation_and_with_block_scales(tmp_path: Path, tokens: Tensor) -> None:
    reference = build("Llama")
    reference.save_pretrained(tmp_path / "float")
    overrides = [{"targets": ["down_proj"], "input_transform": "hadamard"}]
    blocks = {"granularity": "per_block", "block_size": 16, "scale_dtype": "e4m3"}
    wish = Recipe.model_validate({
        "bits": {"embedding": 16, "weight": 8, "activation": 8, "lm_head": 16}, "overrides": overrides, "search": {"rounds": 1},
        "weights": {**blocks, "formats": ["e2m5"]}, "inputs": {**blocks, "formats": ["e2m5"], "shift": False},
    })  # fmt: skip
    model = llm_fp4.load(llm_fp4.quantize(tmp_path / "float", tmp_path / "out", wish, tokens=tokens))
    assert model.model.layers[0].mlp.down_proj.spec.transform == "hadamard"
    expected = reference(tokens).logits.detach()
    error = (model(tokens).logits.detach() - expected).square().mean() / expected.square().mean()
    assert 0 < float(error) < 0.05


def test_an_interrupted_rotated_run_ends_with_the_same_bytes(
    tmp_path: Path, tiny_llama: Callable[..., Any], tokens: Tensor
) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "float")
    wish = recipe({"embedding": 4, "weight": 4, "activation": 4})
    whole = llm_fp4.quantize(tmp_path / "float", tmp_path / "whole", wish, tokens=tokens)

    def killed(stage: str, done: int, total: int) -> None:
        if stage == "quantize" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm_fp4.quantize(tmp_path / "float", tmp_path / "out", wish, tokens=tokens, progress=killed)
    again = llm_fp4.quantize(tmp_path / "float", tmp_path / "out", wish, tokens=tokens)
    for file in sorted(whole.iterdir()):
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name


def test_a_model_in_memory_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"transforms\.rotation is not implemented for a model in memory"):
        llm_fp4.quantize_module(build("Llama"), [torch.arange(2, 40)[None]], recipe(EIGHT))


@pytest.mark.parametrize("name", ["fast", "balanced", "best"])
def test_named_recipes_run(tmp_path: Path, spiked_llama: Callable[..., Any], tokens: Tensor, name: str) -> None:
    reference = spiked_llama(tie_word_embeddings=True)
    reference.save_pretrained(tmp_path / "float")
    wish = llm_fp4.load_recipe(name)
    more = wish.transforms.model_copy(update={"epochs": 20, "learning_rate": 0.02})  # 240 tokens are few to learn from
    wish = wish.model_copy(update={"transforms": more})
    model = llm_fp4.load(llm_fp4.quantize(tmp_path / "float", tmp_path / "out", wish, tokens=tokens))
    down = model.model.layers[0].mlp.down_proj
    assert (down.spec.transform, down.exact) == ({"fast": None, "balanced": "hadamard", "best": "kronecker_8x8"}[name], True)
    assert (down.spec.granularity == "per_token") >= (name in ("fast", "best"))
    assert model.lm_head.weight_format.bits == (8 if name == "best" else 4)
    assert torch.isfinite(model(tokens).logits).all()
