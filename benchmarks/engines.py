"""SmolLM2-135M in other engines: how far their predictions are from ours, and how fast they are.

    python benchmarks/engines.py quantize                                           # the checkpoints, once
    .venv/engines/ENGINE/bin/python benchmarks/engines.py ENGINE [CHECKPOINT...]    # in each engine's environment (make test-engines)

ENGINE is openvino, onnx, compressed-tensors, vllm or gguf; the last wants llama.cpp built for this machine:
``.venv/engines/gguf/bin/python -m pip install --no-deps llama-cpp-python diskcache jinja2``.

Predictions are compared on held-out windows of WikiText-2 (or Alice): the mean and the largest KL divergence of a position, in
nats from our distribution to the engine's, and the share of positions with the same best token. A weight-only export is
compared with our own run of it with float inputs. llama.cpp rounds inputs to 8 bits in blocks of 32: compared are the same weights
written in float32, which it multiplies with float inputs; beside that stands the file as exported, against our float inputs and
against our run under the same rounding. W4A4 blocks are compared with our rounding and one float32 sum a row, as transformers sums, and
with our kernels, which sum block by block. Speeds are tokens a second of processor time, prompt and decoding, of the engine and of
our own run of the same checkpoint.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import engine_runs
import torch
from common import WORK, record, recorded, smollm2, spread, texts
from engine_runs import VOCABULARY, Logits, q8_0
from torch import Tensor
from torch.nn.functional import linear

import llm_fp4
from llm_fp4.api import export
from llm_fp4.kernels.blocks import quantize_blocks
from llm_fp4.models import open_tokenizer
from llm_fp4.nn import QuantLinear
from llm_fp4.recipe import Recipe

_WEIGHTS = {
    "e2m1": {"formats": ["e2m1"]},
    "e1m2": {"formats": ["e1m2"]},
    "nvfp4": {"formats": ["e2m1"], "granularity": "per_block", "block_size": 16, "scale_dtype": "e4m3"},
    "mxfp4": {"formats": ["e2m1"], "granularity": "per_block", "block_size": 32, "scale_dtype": "e8m0"},
    "q4_0": {"formats": ["e1m2"], "granularity": "per_block", "block_size": 32, "scale_dtype": "float16"},
}  # fmt: skip
_FLOAT = {"embedding": 16, "weight": 4, "activation": 16}
RECIPES: dict[str, dict[str, Any]] = {
    **{name: {"method": "minmax", "bits": _FLOAT, "weights": weights} for name, weights in _WEIGHTS.items()},
    "nvfp4-w4a4": {
        "method": "minmax", "bits": {**_FLOAT, "activation": 4}, "weights": _WEIGHTS["nvfp4"], "ignore": ["lm_head"],
        "inputs": {**_WEIGHTS["nvfp4"], "shift": False},
    },
    **{
        f"w{weight}a8": {
            "method": "minmax", "bits": {"embedding": 16, "weight": weight, "activation": 8},
            "inputs": {"formats": ["e1m6"], "granularity": "per_token"}, **({"weights": {"formats": ["e1m6"]}} if weight == 8 else {}),
        }
        for weight in (4, 8)
    },
    "w4a4": {"method": "minmax", "inputs": {"granularity": "per_token"}},
}  # fmt: skip
ENGINES = {  # each: what runs it, and the checkpoints it is given
    "openvino": (engine_runs.openvino, ["e2m1", "e1m2"]),
    "onnx": (engine_runs.onnx, ["e1m2"]),
    "compressed-tensors": (engine_runs.compressed_tensors, ["nvfp4", "mxfp4", "nvfp4-w4a4"]),
    "gguf": (engine_runs.llama_cpp, ["q4_0", "mxfp4", "nvfp4"]),
    "vllm": (engine_runs.vllm, ["e2m1", "w4a8", "w8a8", "w4a4"]),
}


def checkpoint(name: str) -> Path:
    folder = WORK / "engines" / name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        source = smollm2()
        windows, _ = texts(open_tokenizer(source), 256)
        start = time.perf_counter()
        llm_fp4.quantize(source, folder, Recipe.model_validate({"name": name, **RECIPES[name]}), tokens=spread(windows, 2))
        print(f"{name} quantized in {time.perf_counter() - start:.0f} s", flush=True)
    return folder


def exported(name: str, target: str) -> Path:
    """Return the directory to run: our checkpoint itself in vLLM."""
    if target == "vllm":
        return checkpoint(name)
    out = WORK / "engines" / f"{name}.{target}"
    if not out.exists():
        export(checkpoint(name), out, target)
    return out


def loaded(name: str, inputs: str) -> Any:
    """Return our model of a checkpoint, its inputs "quantized", in "float", or in "q8": int8 in blocks of 32 as llama.cpp's.

    "dense" rounds inputs of E2M1 blocks as "quantized" does and multiplies them as transformers would: one sum a row in float32.
    """
    model = llm_fp4.load(checkpoint(name), dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, QuantLinear) and inputs == "dense":
            module.forward = partial(_dense, module)
        elif isinstance(module, QuantLinear) and inputs != "quantized":
            module.spec = None
            if inputs == "q8":
                module.register_forward_pre_hook(lambda _, args: (q8_0(args[0]),))
    return model


def _dense(layer: QuantLinear, x: Tensor) -> Tensor:
    rows = quantize_blocks(x.flatten(0, -2), layer.input_scale, 16, "e4m3", 2, 1)
    return linear(rows, layer.weight, layer.bias).unflatten(0, x.shape[:-1])


def disturbed(model: Any) -> Any:
    """Return the model with every norm's output off by about one float32 rounding: what it moves by, no other engine can stay within."""
    torch.manual_seed(0)
    for name, module in model.named_modules():
        if name.endswith("layernorm"):
            module.register_forward_hook(lambda _, args, out: out * (1 + 1e-7 * torch.randn_like(out)))
    return model


def distance(ours: Any, engine: Logits, windows: Tensor) -> dict[str, float]:
    """Return the divergence of the engine's predictions from ours, the share of equal best tokens, and our perplexity."""
    kls, same, likely = [], [], []
    for window in windows:
        a, b = (logits.double().log_softmax(-1) for logits in (ours(input_ids=window[None]).logits[0], engine(window)))
        kls.append((a.exp() * (a - b)).sum(-1))
        same.append(a.argmax(-1) == b.argmax(-1))
        likely.append(a[:-1].gather(-1, window[1:, None]))
    kl, equal = torch.cat(kls), torch.cat(same)
    return {
        "kl": float(kl.mean()), "kl_max": float(kl.max()), "top1": float(equal.double().mean()), "positions": len(kl),
        "perplexity": float((-torch.cat(likely).mean()).exp()),
    }  # fmt: skip


def compare(target: str, name: str, windows: Tensor, prompt: Tensor, new: int) -> dict[str, Any]:
    engine = ENGINES[target][0](exported(name, target))
    inputs = "float" if RECIPES[name].get("bits", {}).get("activation") == 16 else "quantized"
    model = loaded(name, inputs)
    row: dict[str, Any] = {"engine": engine.name, "checkpoint": name, "inputs": inputs}
    if inputs == "quantized":
        noisy = disturbed(loaded(name, inputs))
        row["our_own_noise"] = distance(model, lambda ids: noisy(input_ids=ids[None]).logits[0], windows)
    if name == "nvfp4-w4a4":
        row["our_kernels"] = distance(model, engine.logits, windows)
        row |= distance(loaded(name, "dense"), engine.logits, windows)
    else:
        row |= distance(model, engine.in_float or engine.logits, windows)
    if engine.in_float is not None:
        row["rounding_inputs"] = distance(model, engine.logits, windows)
        row["both_rounding_inputs"] = distance(loaded(name, "q8"), engine.logits, windows)
    return {**row, **engine.speed(prompt, new), "ours": engine_runs.ours(model)(prompt, new)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=["quantize", *ENGINES])
    parser.add_argument("checkpoints", nargs="*", help="default: all that the engine is given; results of the others are kept")
    parser.add_argument("--windows", type=int, default=4, help="of 256 tokens")
    parser.add_argument("--prompt", type=int, default=128, help="tokens whose speed is measured")
    parser.add_argument("--new", type=int, default=32, help="tokens decoded after them")
    options = parser.parse_args()
    if options.engine == "quantize":
        for name in RECIPES:
            checkpoint(name)
        return
    _, held = texts(open_tokenizer(smollm2()), 256)
    prompt = torch.randint(0, VOCABULARY, (options.prompt,), generator=torch.Generator().manual_seed(0))
    result = f"engines-{options.engine}"
    rows = {row["checkpoint"]: row for row in recorded(result)}
    with torch.inference_mode():
        for name in options.checkpoints or ENGINES[options.engine][1]:
            rows[name] = compare(options.engine, name, spread(held, options.windows), prompt, options.new)
            print(json.dumps(rows[name]), flush=True)
            record(result, list(rows.values()))


if __name__ == "__main__":
    main()
