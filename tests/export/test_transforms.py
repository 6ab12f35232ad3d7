"""A checkpoint whose inputs pass a transform or have an offset is not exported without it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llm_fp4.checkpoint import ModuleEntry
from llm_fp4.errors import UnsupportedError
from llm_fp4.export.graph import float_twin
from llm_fp4.export.holding import hold_weights
from llm_fp4.nn import QuantLinear
from llm_fp4.numerics import PerRow, parse, quantize_tensor
from llm_fp4.plan import InputPlan, InputSpec


def test_an_online_transform_is_refused_by_name() -> None:
    plain = ModuleEntry("linear", parse("e2m1"), (8, 16), InputSpec(parse("e2m1")))
    mixed = ModuleEntry("linear", parse("e2m1"), (8, 16), InputSpec(parse("e2m1"), transform="hadamard"))
    assert hold_weights({"up": plain}, "ONNX", {"up": "FLOAT4E2M1"}, "no remedy").containers == {"up": "FLOAT4E2M1"}
    with pytest.raises(UnsupportedError, match="ONNX cannot hold the hadamard transform of the inputs of down, and without it"):
        hold_weights({"up": plain, "down": mixed}, "ONNX", dict.fromkeys(("up", "down"), "FLOAT4E2M1"), "no remedy")


def test_offsets_and_gained_biases_are_refused_by_name() -> None:
    offset = ModuleEntry("linear", parse("e2m1"), (8, 16), InputSpec(parse("ue2m2"), offset=True))
    gained = ModuleEntry("linear", parse("e2m1"), (8, 16), InputSpec(parse("e2m1")), added_bias=True)
    with pytest.raises(UnsupportedError, match="GGUF cannot hold the input offsets of down, and without them the biases are wrong"):
        hold_weights({"down": offset}, "GGUF", {"down": "F16"}, "no remedy")
    with pytest.raises(UnsupportedError, match="GGUF has no place for the bias that up gained"):
        hold_weights({"up": gained}, "GGUF", {"up": "F16"}, "no remedy")


def test_a_float_twin_takes_the_offset_out_of_the_bias() -> None:
    torch.manual_seed(0)
    weight = quantize_tensor(torch.randn(5, 16), torch.full((5,), 0.3), parse("e2m1"), PerRow())
    plan = InputPlan("x", ["x"], InputSpec(parse("e2m1"), offset=True), torch.tensor(0.1), offset=torch.randn(16))
    layer = QuantLinear.from_plan(weight, plan, None, torch.randn(5))
    model, x = nn.ModuleDict({"layer": layer}), torch.randn(3, 16)
    expected = (x - layer.input_offset) @ layer.weight.t() + layer.bias
    float_twin(model)
    assert torch.allclose(model["layer"](x), expected, atol=1e-5)
    entry = ModuleEntry("linear", parse("e2m1"), (5, 16), plan.spec, added_bias=True)
    assert hold_weights({"layer": entry}, "ONNX", {"layer": "FLOAT4E2M1"}, "", new_biases=True).containers == {
        "layer": "FLOAT4E2M1"
    }
