"""Patch embeddings as linears over patches: the same function, quantized where asked for, read back by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import llm_fp4
from llm_fp4.api import export
from llm_fp4.doctor import diagnose
from llm_fp4.errors import UnsupportedError
from llm_fp4.nn import PackedModule, PatchLinear, put_together, separate_patches
from llm_fp4.recipe import Recipe

from .families import batch, build, scores

RULES = Recipe.model_validate({"search": {"rounds": 1}, "patches": True})


@pytest.mark.parametrize(
    ("convolution", "shape"),
    [
        (nn.Conv2d(3, 10, 8, 8), (2, 3, 32, 24)),
        (nn.Conv2d(3, 10, (4, 2), (4, 2), bias=False), (2, 3, 9, 7)),  # what fills no patch
        (nn.Conv1d(5, 6, 4, 4), (3, 5, 21)),
        (nn.Conv3d(2, 4, (2, 3, 3), (2, 3, 3), padding="valid"), (1, 2, 4, 6, 9)),
    ],
)
def test_it_is_the_same_function(convolution: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    holder = nn.Sequential(convolution)
    expected = holder(x)
    assert separate_patches(holder, lambda name: name == "0.patches") == ["0"]
    assert isinstance(holder[0], PatchLinear)
    torch.testing.assert_close(holder(x), expected, rtol=1e-5, atol=1e-5)
    put_together(holder)
    assert holder[0] is convolution


class Standardized(nn.Conv2d):
    """Computes something else than its weight says."""


@pytest.mark.parametrize(
    "convolution",
    [
     nn.Conv2d(3, 6, 1), Standardized(3, 6, 2, 2), nn.Conv2d(3, 6, 3),
     nn.Conv2d(3, 6, 2, 2, padding=1), nn.Conv2d(3, 6, 2, 2, groups=3), nn.Conv2d(3, 6, 2, 2, dilation=2),
     nn.ConvTranspose2d(3, 6, 2, 2)],
)  # fmt: skip
def test_other_convolutions_stay(convolution: nn.Module) -> None:
    holder = nn.Sequential(convolution)
    assert separate_patches(holder, lambda name: True) == []
    assert holder[0] is convolution


@pytest.mark.parametrize("family", ["ViT", "DeiT", "Swin", "CLIP"])
def test_disk_equals_memory(family: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path / "float")
    data = batch(family)
    out = llm_fp4.quantize(tmp_path / "float", tmp_path / "out", RULES, batches=[data])
    model = llm_fp4.load(out)
    (name, patches), *others = [(n, m) for n, m in model.named_modules() if isinstance(m, PatchLinear)]
    assert not others
    assert isinstance(patches.patches, PackedModule)
    assert f"{name}.patches" in {layer.name for layer in llm_fp4.inspect_model(out).layers if layer.weight}
    memory = llm_fp4.quantize_module(build(family), [data], RULES)
    with torch.no_grad():
        ours, expected, flat = (scores(m(**data)) for m in (model, memory, build(family)))
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(ours, flat)


def test_it_is_asked_for_and_can_be_left_out_again() -> None:
    def patched(**fields: Any) -> list[str]:
        wish = Recipe.model_validate({"search": {"rounds": 1}, **fields})
        model = llm_fp4.quantize_module(build("ViT"), [batch("ViT")], wish)
        return [n for n, m in model.named_modules() if isinstance(m, PatchLinear)]

    assert patched() == []
    assert patched(patches=True, ignore=["*.patches"]) == []
    assert len(patched(patches=True, overrides=[{"targets": ["*.patches"], "weight_bits": 8, "activation_bits": 8}])) == 1


def test_weights_left_in_float_leave_the_convolution(tmp_path: Path) -> None:
    build("ViT").save_pretrained(tmp_path / "float")
    override = {"targets": ["*.patches"], "weight_bits": 16, "activation_bits": 16}
    for i, fields in enumerate(({"bits": {"lm_head": 16}}, {"overrides": [override]})):
        wish = Recipe.model_validate({"search": {"rounds": 1}, "patches": True, **fields})
        model = llm_fp4.load(llm_fp4.quantize(tmp_path / "float", tmp_path / str(i), wish, batches=[batch("ViT")]))
        convolution = model.vit.embeddings.patch_embeddings.projection
        assert torch.equal(convolution.weight, build("ViT").vit.embeddings.patch_embeddings.projection.weight)


@pytest.mark.parametrize("family", ["ViT", "CLIP"])
def test_a_bfloat16_model_runs(family: str, tmp_path: Path) -> None:
    """Its code casts the pixels to the type of the convolution's weight."""
    build(family).bfloat16().save_pretrained(tmp_path / "float")
    out = llm_fp4.quantize(tmp_path / "float", tmp_path / "out", RULES, batches=[batch(family)])
    model = llm_fp4.load(out, dtype=torch.bfloat16)
    data = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch(family).items()}
    (patches,) = [m for m in model.modules() if isinstance(m, PatchLinear)]
    assert patches.weight.dtype == torch.bfloat16
    assert patches.weight.dim() == 4
    assert bool(torch.isfinite(scores(model(**data))).all())


def test_gradients_of_the_float_model_find_the_patches(tmp_path: Path) -> None:
    build("ViT").save_pretrained(tmp_path / "float")
    wish = RULES.model_copy(update={"search": RULES.search.model_copy(update={"objective": "fisher"})})
    out = llm_fp4.quantize(tmp_path / "float", tmp_path / "out", wish, batches=[batch("ViT")])
    assert any(isinstance(m, PatchLinear) for m in llm_fp4.load(out).modules())


def test_exports_refuse_them_and_the_doctor_knows_them(tmp_path: Path) -> None:
    build("ViT").save_pretrained(tmp_path / "float")
    out = llm_fp4.quantize(tmp_path / "float", tmp_path / "out", RULES, batches=[batch("ViT")])
    with pytest.raises(UnsupportedError, match=r"a convolution in the place of vit\..*projection\.patches"):
        export(out, tmp_path / "exported", "compressed-tensors")
    found = diagnose(out, tmp_path / "float")
    assert not [f for f in found.findings if "patches" in str(f)], found


def test_an_error_leaves_the_convolution() -> None:
    model = build("ViT")
    bad = {k: torch.full_like(v, float("nan")) for k, v in batch("ViT").items()}
    with pytest.raises(llm_fp4.errors.LlmFp4Error):
        llm_fp4.quantize_module(model, [bad], RULES)
    assert not any(isinstance(m, PatchLinear) for m in model.modules())
