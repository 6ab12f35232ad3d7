"""Attention products: intercepted in the model's own attention, masks kept, rounded as the simulation says, on disk as in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import llm_fp4
from llm_fp4.errors import CheckpointError, RecipeError
from llm_fp4.nn import CHILD, AttentionProducts, attend, watching
from llm_fp4.numerics import fake_quantize, parse
from llm_fp4.plan import AttentionSpec, ProductPlan
from llm_fp4.recipe import Recipe, load_recipe
from llm_fp4.search import ProductSample, search_product

ENCODER = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
QUICK = {"search": {"rounds": 1}, "bits": {"embedding": 16, "weight": 8, "activation": 8}}
IDS = torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS).index_fill_(1, torch.tensor([22, 23]), 0)


def build(kind: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "decoder":
            config = transformers.LlamaConfig(**ENCODER, num_key_value_heads=2, initializer_range=0.2)
            return transformers.LlamaForCausalLM(config).eval()
        return transformers.BertForMaskedLM(transformers.BertConfig(**ENCODER, initializer_range=0.2)).eval()


def softmax_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float = 0.5
) -> Tensor:
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    return (weights if mask is None else weights + mask).softmax(-1) @ value


def test_both_products_read_rounded_inputs_and_nothing_else_changes() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 8, generator=generator) for _ in range(3))
    module = nn.Module()
    assert torch.equal(attend(softmax_attention, module, q, k, v, None), softmax_attention(module, q, k, v, None))
    spec = AttentionSpec((parse("e2m1"), parse("e1m2"), parse("ue2m2"), parse("e4m3")))
    products = AttentionProducts(spec)
    products.query_scale, products.key_scale, products.probability_scale, products.value_scale = (
        torch.tensor(s) for s in (0.3, 0.5, 0.02, 0.01)
    )
    module.add_module(CHILD, products)
    rounded = [
        fake_quantize(x, s, f) for x, s, f in ((q, products.query_scale, spec.formats[0]), (k, products.key_scale, spec.formats[1]))
    ]
    weights = (rounded[0] @ rounded[1].transpose(2, 3) * 0.5).softmax(-1)
    expected = fake_quantize(weights, products.probability_scale, spec.formats[2]) @ fake_quantize(
        v, products.value_scale, spec.formats[3]
    )
    assert torch.equal(attend(softmax_attention, module, q, k, v, None), expected)
    assert module.bfloat16().get_submodule(CHILD).query_scale.dtype == torch.float32


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_the_seam_keeps_every_mask(kind: str) -> None:
    from llm_fp4.integrations.attention import use_quantized_attention

    model = build(kind)
    with torch.no_grad():
        expected = model(IDS, attention_mask=MASK).logits
        unmasked = model(IDS).logits
        assert use_quantized_attention(model)
        with watching(lambda *_: None):  # so that products are intercepted
            found = model(IDS, attention_mask=MASK).logits
    kept = MASK.bool()
    assert torch.allclose(found[kept], expected[kept], atol=1e-5)
    assert kind == "decoder" or not torch.allclose(expected[kept], unmasked[kept], atol=1e-3)


@pytest.mark.parametrize(("kind", "granularity"), [("decoder", "per_tensor"), ("encoder", "per_head")])
@pytest.mark.parametrize("method", ["fpq", "minmax"])
def test_disk_equals_memory(kind: str, granularity: str, method: str, tmp_path: Path) -> None:
    rules = Recipe.model_validate({**QUICK, "method": method, "attention": {"bits": 4, "granularity": granularity}})
    data = {"input_ids": IDS, "attention_mask": MASK}
    build(kind).save_pretrained(tmp_path / "float")
    out = llm_fp4.quantize(tmp_path / "float", tmp_path / "out", rules, batches=[data])
    model, memory = llm_fp4.load(out), llm_fp4.quantize_module(build(kind), [data], rules)
    plain = llm_fp4.quantize_module(build(kind), [data], Recipe.model_validate({**QUICK, "method": method}))
    with torch.no_grad():
        ours, expected, without = (m(**data).logits for m in (model, memory, plain))
    assert torch.allclose(ours, expected, atol=1e-5)
    assert not torch.allclose(ours, without, atol=1e-3)
    report = llm_fp4.inspect_model(out).attention
    assert len(report) == 2
    assert report[0].formats[2][0].startswith("ue")
    assert all(e is not None and 0 < e < 0.2 for a in report for e in a.errors)
    products = [m for m in model.modules() if isinstance(m, AttentionProducts)]
    assert products[0].query_scale.shape == ((4, 1, 1) if granularity == "per_head" else ())


def test_generation_with_a_cache_is_that_without(tmp_path: Path) -> None:
    rules = Recipe.model_validate({**QUICK, "attention": {"bits": 6}})
    model = llm_fp4.quantize_module(build("decoder"), [IDS], rules)
    steps = [
        model.generate(IDS[:1], max_new_tokens=6, do_sample=False, use_cache=cached, pad_token_id=0) for cached in (True, False)
    ]
    assert torch.equal(*steps)


def test_search_beats_maxima_and_heads_beat_the_tensor() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([1.0, 0.1, 8.0]).view(3, 1, 1)
    pairs = [
        (torch.randn(3, 16, 8, generator=generator) * spread, torch.randn(3, 8, 24, generator=generator) / spread) for _ in range(4)
    ]
    sample = ProductSample([a for a, _ in pairs], [b for _, b in pairs], [None] * 4)
    four = tuple(parse(n) for n in ("e1m2", "e2m1", "e3m0"))
    search = Recipe().search
    minmax = search_product(sample, ((parse("e2m1"),), (parse("e2m1"),)), None, False)
    tensor = search_product(sample, (four, four), search, False)
    heads = search_product(sample, (four, four), search, True)
    assert heads.error < tensor.error < minmax.error
    assert heads.scales[0].shape == (3, 1, 1)


def test_masked_products_do_not_count() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(1, 8, 4, generator=generator), torch.randn(1, 4, 8, generator=generator)
    hidden = torch.ones(1, 8, 8)
    hidden[..., 4:] = 0
    wild = b.clone()
    wild[..., 4:] *= 1e4
    fmt = ((parse("e4m3"),), (parse("e4m3"),))
    counted = search_product(ProductSample([a], [wild], [hidden]), fmt, Recipe().search, False)
    assert counted.error < search_product(ProductSample([a], [wild], [hidden]), fmt, None, False).error


def test_unsigned_formats_are_for_probabilities_only() -> None:
    signed, probabilities = Recipe.model_validate({"attention": {"bits": 4}}).attention_formats()
    assert all(f.signed for f in signed)
    assert not any(f.signed for f in probabilities)
    assert Recipe.model_validate({"attention": {"bits": 4, "unsigned": False}}).attention_formats()[1] == signed
    assert Recipe().attention_formats() == ((), ())
    nvfp4 = Recipe.model_validate({**load_recipe("nvfp4").model_dump(), "attention": {"bits": 4}})
    assert nvfp4.attention_formats() == (signed, probabilities)  # E2M1 is what the blocks of linears' inputs ask for
    with pytest.raises(RecipeError, match="change the formats or the bits"):
        Recipe.model_validate({"attention": {"bits": 4, "formats": ["ue2m2"]}}).attention_formats()
    integers = Recipe.model_validate(
        {"method": "minmax", "inputs": {"formats": ["int"]}, "attention": {"bits": 8}}
    ).attention_formats()
    assert [f[0].name for f in integers] == ["e1m6", "ue1m7"]


def test_a_model_without_the_seam_says_so() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block()])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](x)

    model = llm_fp4.quantize_module(Model(), [torch.randn(16, 8)], Recipe.model_validate({**QUICK, "attention": {"bits": 4}}))
    assert not any(isinstance(m, AttentionProducts) for m in model.modules())


def test_damaged_scales_are_named(tmp_path: Path) -> None:
    build("encoder").save_pretrained(tmp_path / "float")
    rules = Recipe.model_validate({**QUICK, "attention": {"bits": 8}})
    out = llm_fp4.quantize(tmp_path / "float", tmp_path / "out", rules, batches=[{"input_ids": IDS}])
    config = json.loads((out / "config.json").read_text())
    name = next(iter(config["quantization_config"]["attention"]))
    config["quantization_config"]["attention"][name]["heads"] = 4
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"query_scale is \(\).*damaged"):
        llm_fp4.load(out)


def test_a_plan_rounds_only_what_was_decided() -> None:
    products = AttentionProducts()
    x = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    assert products.rounded(0, x, x) == (x, x)
    products.decide(1, ProductPlan((parse("ue2m2"), parse("e2m1")), (torch.tensor(0.1), torch.tensor(0.1)), 0.0))
    assert products.rounded(0, x, x)[0] is x
    assert bool((products.rounded(1, x, x)[0] >= 0).all())
    assert products.spec is None
