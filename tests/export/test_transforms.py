"""A checkpoint whose inputs pass a transform is not exported without it."""

from __future__ import annotations

import pytest

from llm_fp4.checkpoint import ModuleEntry
from llm_fp4.errors import UnsupportedError
from llm_fp4.export.holding import hold_weights
from llm_fp4.numerics import parse
from llm_fp4.plan import InputSpec


def test_an_online_transform_is_refused_by_name() -> None:
    plain = ModuleEntry("linear", parse("e2m1"), (8, 16), InputSpec(parse("e2m1")))
    mixed = ModuleEntry("linear", parse("e2m1"), (8, 16), InputSpec(parse("e2m1"), transform="hadamard"))
    assert hold_weights({"up": plain}, "ONNX", lambda entry: "FLOAT4E2M1", "no remedy").containers == {"up": "FLOAT4E2M1"}
    with pytest.raises(UnsupportedError, match="ONNX cannot hold the hadamard transform of the inputs of down, and without it"):
        hold_weights({"up": plain, "down": mixed}, "ONNX", lambda entry: "FLOAT4E2M1", "no remedy")
