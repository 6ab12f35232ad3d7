"""The named recipes, as data; every field that is not named has its default."""

from __future__ import annotations

from typing import Any

_NVFP4: dict[str, Any] = {"formats": ["e2m1"], "granularity": "per_block", "block_size": 16, "scale_dtype": "e4m3"}
_MXFP4: dict[str, Any] = {"formats": ["e2m1"], "granularity": "per_block", "block_size": 32, "scale_dtype": "e8m0"}
_ROTATED: dict[str, Any] = {"rotation": "hadamard", "online": True}
_OUTER_FLOAT = {"embedding": 16, "lm_head": 16}  # what engines leave in float


def _block_preset(rules: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"bits": _OUTER_FLOAT, "weights": rules, "inputs": {**rules, "shift": False, "sinks": "static"}, **fields}


PRESETS: dict[str, dict[str, Any]] = {
    "fpq": {"method": "fpq"},
    "fpq-baseline": {"method": "fpq-baseline", "inputs": {"shift": False, "sinks": "static", "unsigned": False}},
    "fpq-gptq": {"method": "fpq", "search": {"compensation": "gptq"}},
    "minmax-fp": {"method": "minmax", "inputs": {"shift": False, "sinks": "static"}},
    "minmax-int": {
        "method": "minmax",
        "weights": {"formats": ["int"]},
        "inputs": {"formats": ["int"], "shift": False, "sinks": "static"},
    },
    "smoothquant": {"method": "smoothquant", "inputs": {"shift": False, "sinks": "static"}},
    "fpq-paper": {
        "method": "fpq",
        "inputs": {"sinks": "static", "unsigned": False},
        "search": {"grid": "paper", "propagation": "parallel"},
    },
    "fast": {"inputs": {"granularity": "per_token"}, "search": {"rounds": 1, "sample_tokens": 512}},
    "balanced": {
        "transforms": _ROTATED,
        "inputs": {"shift_range": "search"},
        "search": {"compensation": "gptq", "rounds": 1},
    },
    "best": {
        "bits": {"lm_head": 8},
        "transforms": {"learned": True},
        "inputs": {"granularity": "per_token", "shift_range": "search"},
        "search": {"compensation": "gptq", "rounds": 1},
    },
    "nvfp4": _block_preset(_NVFP4, search={"compensation": "gptq"}),
    # without outlier_tokens error compensation took ViT-Ti below plain FPQ, see docs/adr/0018
    "mxfp4": _block_preset(_MXFP4, search={"compensation": "gptq", "outlier_tokens": 16}),
    "nvfp4-rtn": _block_preset(_NVFP4, method="minmax"),
    "mxfp4-rtn": _block_preset(_MXFP4, method="minmax"),
}
SUMMARIES: dict[str, str] = {
    "fpq": "format, scale and channel shift searched by output error; per-token scale at attention-sink sites (default)",
    "fpq-baseline": "format and scale searched, static per-tensor inputs without shift",
    "fpq-gptq": "fpq, then levels chosen with error compensation (GPTQ on the float grid)",
    "minmax-fp": "the standard float format of the width (E2M1, E4M3), scales from the largest magnitude",
    "minmax-int": "symmetric integers (INT4 is -7..7, the grid of E1M2), scales from the largest magnitude",
    "smoothquant": "integers with input range migrated into the weights (alpha 0.5), scales from the largest magnitude",
    "fpq-paper": "as published: the paper's grid of biases, float inputs to every layer, all scales static",
    "fast": "one round on few tokens, a scale per token; any model",
    "balanced": "rotation, shift ranges searched, error compensation, static scales but at sinks; models like LLaMA",
    "best": "a learned map of every input, a scale per token, error compensation, an 8-bit output head; any model, many times slower",
    "nvfp4": "E2M1 in blocks of 16 (E4M3 scales), weights' scales searched, error compensation; embedding and head in float",
    "mxfp4": "E2M1 in blocks of 32 (E8M0 scales), weights' scales searched, error compensation; embedding and head in float",
    "nvfp4-rtn": "nvfp4 as engines round it: scales from the largest magnitude, nearest levels",
    "mxfp4-rtn": "mxfp4 as engines round it: scales from the largest magnitude, nearest levels",
}
