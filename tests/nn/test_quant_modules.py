"""The forward of quantized modules against the fake-quantized simulation, for every combination of formats."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from llm_fp4.errors import CheckpointError
from llm_fp4.kernels.compiled import available, select
from llm_fp4.kernels.hadamard import hadamard_reference
from llm_fp4.kernels.simulate import fake_quantize_input
from llm_fp4.nn import QuantEmbedding, QuantLinear, borrow_weight, replace_module, share_weight
from llm_fp4.nn.shared import InputSite
from llm_fp4.numerics import (
    FloatFormat,
    PerBlock,
    PerRow,
    formats_of_width,
    max_scale,
    neighbour,
    parse,
    quantize_tensor,
    scale_of_max,
)
from llm_fp4.plan import InputPlan, InputSpec

FOUR = formats_of_width(4)
PAIRS = [
    *itertools.product(FOUR, FOUR),
    *itertools.product(FOUR, formats_of_width(8)),
    *((w, a) for w in formats_of_width(6) for a in formats_of_width(6)),
    *((w, a) for w in formats_of_width(8) for a in formats_of_width(8)),
]


def layer_of(weight_format: FloatFormat, spec: InputSpec | None, bias: bool = True, inner: int = 37, out: int = 11) -> QuantLinear:
    torch.manual_seed(3)
    weight = torch.randn(out, inner) / 6
    quantized = quantize_tensor(weight, scale_of_max(weight.abs().amax(1), weight_format), weight_format, PerRow())
    plan = None
    if spec is not None:
        shift = torch.randint(0, spec.max_shift + 1, (inner,), dtype=torch.uint8) if spec.max_shift else None
        scale = torch.tensor(0.9) if spec.granularity == "per_token" else scale_of_max(torch.tensor(3.0), spec.format)
        plan = InputPlan("x", ["x"], spec, scale, shift, torch.rand(inner) + 0.5 if spec.smooth else None)
        plan.offset = torch.randn(inner) if spec.offset else None
    return QuantLinear.from_plan(quantized, plan, torch.randn(out) if bias else None)


def simulated(layer: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(-1, layer.in_features)
    if layer.spec is not None:
        rows = rows if layer.spec.transform is None else hadamard_reference(rows)
        rows = rows if layer.input_offset is None else rows - layer.input_offset
        rows = fake_quantize_input(rows, layer.spec, layer.input_scale, layer.input_shift, layer.input_smooth)
    out = rows.double() @ layer.quantized.dequantize().double().t()
    return out if layer.bias is None else out + layer.bias.double()


@pytest.mark.parametrize(("weight_format", "input_format"), PAIRS, ids=str)
def test_forward_is_the_simulation_to_float32_rounding(weight_format: FloatFormat, input_format: FloatFormat) -> None:
    for max_shift, granularity in ((0, "per_tensor"), (input_format.max_shift, "per_tensor"), (2, "per_token")):
        layer = layer_of(weight_format, InputSpec(input_format, granularity, max_shift))
        x = torch.randn(5, 37)
        expected = simulated(layer, x)
        assert torch.allclose(layer(x).double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_four_bit_pairs_run_on_integers_and_wide_exponents_in_float() -> None:
    for weight_format, input_format in itertools.product(FOUR, FOUR):
        assert layer_of(weight_format, InputSpec(input_format, max_shift=input_format.max_shift)).exact
    assert layer_of(parse("e2m1"), InputSpec(parse("e1m6"), max_shift=1)).exact
    assert layer_of(parse("e1m6"), InputSpec(parse("e1m6"))).exact
    assert not layer_of(parse("e2m1"), InputSpec(parse("e4m3"))).exact
    assert not layer_of(parse("e2m1"), None).exact


@pytest.fixture(params=available())
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    yield select(request.param)
    select()


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("input_format", [*formats_of_width(4, signed=False)[:3], *FOUR], ids=str)
def test_offsets_and_unsigned_inputs_are_the_simulation_on_integers(input_format: FloatFormat) -> None:
    for max_shift, granularity, rows in ((0, "per_tensor", 5), (2, "per_tensor", 40), (2, "per_token", 1)):
        layer = layer_of(parse("e2m1"), InputSpec(input_format, granularity, max_shift, offset=True))
        assert layer.exact
        x = torch.randn(rows, 37) + 1
        expected = simulated(layer, x)
        assert torch.allclose(layer(x).double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        layer.to(torch.bfloat16)
        assert layer.input_offset is not None
        assert layer.input_offset.dtype == torch.float32


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("name", ["e2m1", "e4m3", "nvfp4", "mxfp4"])
def test_a_transformed_input_is_the_simulation(name: str, offset: bool) -> None:
    blocks = {"nvfp4": PerBlock(16, "e4m3"), "mxfp4": PerBlock(32, "e8m0")}.get(name)
    fmt = parse("e2m1") if blocks else parse(name)
    spec = InputSpec(fmt, blocks.name if blocks else "per_token", transform="hadamard", offset=offset)
    layer = layer_of(parse("e2m1"), spec, inner=48)
    if blocks:
        scale = neighbour(max_scale(blocks.absmax(layer.weight), torch.tensor(2.0**-6), fmt, blocks), 0, blocks)
        second = torch.tensor(2.0**-6) if blocks.two_level else None
        weight = quantize_tensor(layer.weight, scale, fmt, blocks, "w", second)
        layer = QuantLinear.from_plan(
            weight,
            InputPlan("x", ["x"], spec, torch.tensor(2.0**-6) if second is not None else torch.ones(()), offset=layer.input_offset),
            layer.bias,
        )
    layer.site = InputSite()
    for rows in (1, 5, 40):  # more than 8 are rounded apart from the product
        for x in (torch.randn(rows, 48) + 1, torch.randn(rows, 48).bfloat16()):
            expected = simulated(layer, x.float())
            tolerance = 1e-5 if x.dtype == torch.float32 else 1e-2
            assert torch.allclose(layer(x).double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_a_folded_bias_is_added_to_the_layer_s_own_or_is_its_first() -> None:
    weight = quantize_tensor(torch.randn(11, 37), torch.ones(11), parse("e2m1"), PerRow())
    own, folded = torch.randn(11), torch.randn(11)
    for its_own, expected in ((own, own + folded), (None, folded)):
        bias = QuantLinear.from_plan(weight, None, its_own, folded).bias
        assert bias is not None
        assert torch.equal(bias, expected)
    assert QuantLinear.from_plan(weight, None, None, folded).folded


@pytest.mark.parametrize("shape", [(1, 37), (0, 37), (2, 3, 37), (37,)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    layer = layer_of(parse("e2m1"), InputSpec(parse("e2m1"), max_shift=3))
    assert layer(torch.zeros(shape)).shape == (*shape[:-1], 11)


def test_weight_only_and_smooth() -> None:
    for layer in (layer_of(parse("e2m1"), None), layer_of(parse("e1m2"), InputSpec(parse("e1m2"), smooth=True), bias=False)):
        x = torch.randn(4, 37)
        assert torch.allclose(layer(x).double(), simulated(layer, x), rtol=1e-5, atol=1e-5)


def test_bfloat16_keeps_codes_and_scales() -> None:
    layer = layer_of(parse("e2m1"), InputSpec(parse("e2m1"), max_shift=3))
    before = {n: t.clone() for n, t in layer.state_dict().items()}
    layer.to(torch.bfloat16)
    for name in ("weight_packed", "weight_scale", "input_scale", "input_shift"):
        assert torch.equal(layer.state_dict()[name], before[name])
        assert layer.state_dict()[name].dtype == before[name].dtype
    assert layer(torch.randn(2, 37, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_packed_weights_are_four_bits_in_memory() -> None:
    layer = layer_of(parse("e2m1"), InputSpec(parse("e2m1")), bias=False, inner=256, out=128)
    layer(torch.randn(3, 256))
    held = sum(t.nbytes for t in layer.state_dict().values())
    assert held == 256 * 128 // 2 + 4 * 128 + 4


def test_embedding_rows_are_the_dequantized_rows() -> None:
    table = torch.randn(20, 15)
    quantized = quantize_tensor(table, scale_of_max(table.abs().amax(1), parse("e2m1")), parse("e2m1"), PerRow())
    module = QuantEmbedding.from_quantized(quantized, torch.float32)
    ids = torch.tensor([[3, 0], [19, 3]])
    assert torch.equal(module(ids), quantized.dequantize()[ids])
    assert module.to(torch.bfloat16)(ids).dtype == torch.bfloat16


def test_replacing_and_sharing() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(12, 8), "head": nn.Linear(8, 12, bias=False)})
    replace_module(model, "embed", parse("e2m1"), None, (12, 8))
    replace_module(model, "head", parse("e2m1"), InputSpec(parse("e2m1")), (12, 8))
    head, embed = model["head"], model["embed"]
    assert isinstance(head, QuantLinear)
    assert isinstance(embed, QuantEmbedding)
    borrow_weight(head)
    share_weight(head, embed)
    assert head.weight_packed is embed.weight_packed
    assert sorted(model.state_dict()) == ["embed.weight_packed", "embed.weight_scale", "head.input_scale"]


def test_replacing_refuses_what_does_not_fit() -> None:
    model = nn.ModuleDict({"head": nn.Linear(8, 12), "norm": nn.LayerNorm(8)})
    with pytest.raises(CheckpointError, match=r"head is \(12, 8\) in the model, the manifest makes it \(12, 9\)"):
        replace_module(model, "head", parse("e2m1"), None, (12, 9))
    with pytest.raises(CheckpointError, match="norm, but that is a LayerNorm"):
        replace_module(model, "norm", parse("e2m1"), None, (12, 8))
    with pytest.raises(CheckpointError, match="does not have"):
        replace_module(model, "tail.head", parse("e2m1"), None, (12, 8))
