"""Learned maps of inputs keep the product, lower the error they are learned for, and run after loading; bad ones are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llm_fp4
from llm_fp4.errors import CheckpointError, UnsupportedError
from llm_fp4.kernels import quantize_blocks
from llm_fp4.nn import QuantLinear
from llm_fp4.numerics import FloatFormat, PerBlock, fake_quantize, parse, second_scale, soft_level
from llm_fp4.plan import InputSpec
from llm_fp4.recipe import Recipe, load_recipe
from llm_fp4.transforms import KroneckerTransform, SoftInput, SoftLinear, soft_blocks

E2M1 = FloatFormat(2, 1)


def recipe(**fields: Any) -> Recipe:
    return Recipe.model_validate({
        "bits": {"embedding": 16, "weight": 4, "activation": 4, "lm_head": 16}, "transforms": {"learned": True, "epochs": 20, "learning_rate": 0.02},
        "inputs": {"granularity": "per_token", "shift_range": "search"}, "search": {"rounds": 1}, **fields,
    })  # fmt: skip


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(2, 258, (6, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("width", [1, 7, 24, 96])
def test_a_map_keeps_the_product(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    found = SoftInput(width, E2M1, generator).transform()
    found.left += 0.1 * torch.randn(found.left.shape, generator=generator)  # no longer orthogonal
    x, w = torch.randn(5, width, generator=generator), torch.randn(9, width, generator=generator)
    torch.testing.assert_close(found.rows(x) @ found.weight(w).t(), x @ w.t(), rtol=1e-4, atol=1e-4)


def test_rounding_passes_the_gradient_of_clipping() -> None:
    x = torch.tensor([0.4, -5.2, 11.9, 13.0, -40.0], requires_grad=True)
    level = soft_level(x, E2M1)
    assert level.tolist() == [0, -6, 12, 12, -12]
    level.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 1, 0, 0]


def test_a_soft_layer_computes_what_its_rounded_tensors_give() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (
        torch.randn(6, 8, generator=generator),
        torch.randn(6, generator=generator),
        torch.randn(4, 8, generator=generator),
    )
    site = SoftInput(8, E2M1, generator)
    layer = SoftLinear(weight, bias, E2M1, site)
    share = torch.sigmoid(site.clip.detach()) / 12
    rows, w = site.transform().rows(x), site.transform().weight(weight)
    q = fake_quantize(rows, rows.abs().amax(1, keepdim=True) * share, E2M1)
    expected = q @ fake_quantize(w, w.abs().amax(1, keepdim=True) * share, E2M1).t() + bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert site.left.grad is None
    layer(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (site.left, site.right, site.clip, layer.clip))


class Outliers(nn.Module):
    """A model whose block's input has two channels fifty times larger than the others, and weights as much smaller there."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(16, 32), "down": nn.Linear(32, 16)})])
        self.layers[0]["up"].weight.data[:, [3, 11]] /= 50.0
        self.layers[0].forward = self._run

    def _run(self, hidden: Tensor) -> Tensor:
        block = self.layers[0]
        scale = torch.ones(16)
        scale[3] = scale[11] = 50.0
        return hidden + block["down"](torch.relu(block["up"](hidden * scale)))

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.layers:
            hidden = block(hidden)
        return hidden


@pytest.mark.parametrize(("granularity", "epochs"), [("per_token", 20), ("per_tensor", 60), ("per_block", 20)])
def test_a_learned_map_lowers_the_error(granularity: str, epochs: int) -> None:
    batches = [torch.randn(4, 32, 16, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    blocks = {"block_size": 32, "scale_dtype": "e8m0"} if granularity == "per_block" else {}
    errors = {}
    for learned in (False, True):
        wish = recipe(
            transforms={"learned": learned, "epochs": epochs, "learning_rate": 0.02},
            inputs={"granularity": granularity, "shift": False, "formats": ["e1m2"], "sinks": "static", **blocks},
            weights={"granularity": "per_block", **blocks} if blocks else {},
        )
        model = Outliers()
        expected = model(batches[0]).detach()
        llm_fp4.quantize_module(model, batches, wish)
        assert (model.layers[0]["up"].spec.transform == "kronecker_4x4") == learned
        errors[learned] = float((model(batches[0]) - expected).square().mean())
    assert errors[True] < 0.7 * errors[False]


def test_a_checkpoint_with_learned_maps_runs(tmp_path: Path, spiked_llama: Callable[..., Any], tokens: Tensor) -> None:
    reference = spiked_llama(seed=3)
    reference.save_pretrained(tmp_path / "float")
    out = llm_fp4.quantize(tmp_path / "float", tmp_path / "out", recipe(), tokens=tokens)
    model = llm_fp4.load(out)
    q, k = (getattr(model.model.layers[0].self_attn, n) for n in ("q_proj", "k_proj"))
    assert isinstance(q, QuantLinear)
    assert q.spec is not None
    assert q.spec.factors == (4, 8)
    assert q.exact
    assert q.site is not None
    assert q.site is k.site
    x = reference.model.layers[0].input_layernorm(reference.model.embed_tokens(tokens))
    expected = reference.model.layers[0].self_attn.q_proj(x).detach()
    assert 0 < float((q(x).detach() - expected).square().mean() / expected.square().mean()) < 0.2
    whole = model(tokens).logits.detach()
    narrow = llm_fp4.load(out, dtype=torch.bfloat16).model.layers[0].self_attn.q_proj
    assert narrow.input_left.dtype == torch.float32
    inside = llm_fp4.quantize_module(spiked_llama(seed=3), [tokens], recipe())
    torch.testing.assert_close(inside(tokens).logits, whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("size", "scale"), [(16, "e4m3"), (32, "e8m0"), (8, "float16")])
def test_soft_blocks_are_the_blocks_of_the_format(size: int, scale: str) -> None:
    x = torch.randn(5, 70, generator=torch.Generator().manual_seed(1)).requires_grad_()
    blocks = PerBlock(size, scale)
    soft = soft_blocks(x, E2M1, blocks)
    second = second_scale(x.detach().abs().amax(), E2M1) if blocks.two_level else torch.ones(())
    torch.testing.assert_close(soft, quantize_blocks(x.detach(), second, size, scale, 2, 1), rtol=1e-6, atol=1e-7)
    soft.sum().backward()
    assert x.grad is not None
    assert float((x.grad == 1).float().mean()) > 0.8


def test_maps_are_learned_under_block_scales(tmp_path: Path, spiked_llama: Callable[..., Any], tokens: Tensor) -> None:
    reference = spiked_llama(seed=3)
    reference.save_pretrained(tmp_path / "float")
    errors = {}
    for learned in (False, True):
        rules = load_recipe("mxfp4").model_dump()
        rules["transforms"] |= {"learned": learned, "epochs": 20}
        rules["search"]["outlier_tokens"] = None  # the spiked channel makes outliers of many tokens; maps are looked at alone
        out = llm_fp4.quantize(tmp_path / "float", tmp_path / f"{learned}", Recipe.model_validate(rules), tokens=tokens)
        block = llm_fp4.load(out).model.layers[1]
        assert block.mlp.down_proj.blocks == PerBlock(32, "e8m0")
        assert block.mlp.down_proj.spec.factors == ((8, 8) if learned else None)
        x = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(5))
        x[..., 3] *= 40.0  # as in calibration
        expected = reference.model.layers[1].mlp.down_proj(x).detach()
        errors[learned] = float((block.mlp.down_proj(x).detach() - expected).square().mean() / expected.square().mean())
    assert errors[True] < 0.2, errors
    assert errors[True] < errors[False], errors


def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path: Path, spiked_llama: Callable[..., Any], tokens: Tensor) -> None:
    spiked_llama().save_pretrained(tmp_path / "float")
    whole = llm_fp4.quantize(tmp_path / "float", tmp_path / "whole", recipe(), tokens=tokens)

    def killed(stage: str, done: int, total: int) -> None:
        if stage == "quantize" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm_fp4.quantize(tmp_path / "float", tmp_path / "out", recipe(), tokens=tokens, progress=killed)
    again = llm_fp4.quantize(tmp_path / "float", tmp_path / "out", recipe(), tokens=tokens)
    for file in sorted(whole.iterdir()):
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name


def test_padding_teaches_nothing(spiked_llama: Callable[..., Any], tokens: Tensor) -> None:
    mask = torch.ones_like(tokens)
    mask[:, 30:] = 0
    maps = []
    for filler in (5, 77):
        ids = torch.where(mask.bool(), tokens, filler)
        model = llm_fp4.quantize_module(spiked_llama(), [{"input_ids": ids, "attention_mask": mask}], recipe())
        maps.append(model.model.layers[1].mlp.down_proj.input_left)
    torch.testing.assert_close(maps[0], maps[1], rtol=1e-3, atol=1e-3)


def test_what_is_not_possible_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="input transform 'kronecker_0x3' is not implemented"):
        InputSpec(parse("e2m1"), transform="kronecker_0x3")


def test_factors_of_another_size_than_the_width_are_refused(
    tmp_path: Path, spiked_llama: Callable[..., Any], tokens: Tensor
) -> None:
    spiked_llama().save_pretrained(tmp_path / "float")
    out = llm_fp4.quantize(tmp_path / "float", tmp_path / "out", recipe(), tokens=tokens)
    config = (out / "config.json").read_text()
    (out / "config.json").write_text(config.replace("kronecker_4x8", "kronecker_4x9"))
    with pytest.raises(CheckpointError, match="36 channels"):
        llm_fp4.load(out)


def test_the_map_is_a_transform_of_the_plan() -> None:
    found = KroneckerTransform(torch.eye(2), torch.eye(3))
    x = torch.arange(12.0).view(2, 6)
    assert torch.equal(found.rows(x), x)
    assert torch.equal(found.weight(x), x)
