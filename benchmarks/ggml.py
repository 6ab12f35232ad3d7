"""One matrix product of llama.cpp (its library ggml), and its whole models, as the ``llama_cpp`` package holds them.

Built on the machine it runs on, that package is as fast as llama.cpp gets: ``pip install --no-binary llama-cpp-python llama-cpp-python``.
Weights lie where llama.cpp would put them: in the first of its buffers (AMX, repacked, plain) that supports the product.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from kernels import Contender, Run

# of ggml.h: its number of the type, bytes of a scale and of the codes in a block of 32, and a scale byte near 1
KINDS = {"Q4_0": (2, 2, 16, 0x3C), "MXFP4": (39, 1, 16, 127)}
_F32 = 0


class _Params(Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_SIGNATURES: dict[str, tuple[Any, Sequence[Any]]] = {
    "ggml_init": (c_void_p, [_Params]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p] * 3),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p] * 2),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p] * 2),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [c_void_p] * 2),
    "ggml_backend_get_default_buffer_type": (c_void_p, [c_void_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_dev_supports_op": (c_bool, [c_void_p] * 2),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_cpu_reg": (c_void_p, []),
    "ggml_log_set": (None, [c_void_p, c_void_p]),
}
_SILENCE = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda level, text, data: None)


@lru_cache(maxsize=1)
def _functions() -> dict[str, Any]:
    """Return ggml's functions, typed."""
    import llama_cpp

    # it names the rest of ggml as what it needs, so that the same copy of it is asked
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-cpu.so"))
    found = {}
    for name, (result, arguments) in _SIGNATURES.items():
        found[name] = function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    found["ggml_log_set"](_SILENCE, None)
    return found


def _buffer_types(g: dict[str, Any], backend: int) -> tuple[int, list[int]]:
    """Return the CPU device and its buffer types, the special ones first."""
    registry = g["ggml_backend_cpu_reg"]()
    device = g["ggml_backend_reg_dev_get"](registry, 0)
    address = g["ggml_backend_reg_get_proc_address"](registry, b"ggml_backend_dev_get_extra_bufts")
    listed = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(device)
    special: list[int] = []
    while listed and listed[len(special)]:
        special.append(listed[len(special)])
    return device, [*special, g["ggml_backend_get_default_buffer_type"](backend)]


def product(kind: str, threads: int) -> Contender:
    """Return the product of float32 inputs, which ggml rounds to 8 bits, with weights of ``kind``, a key of :data:`KINDS`."""
    number, scale_bytes, code_bytes, scale = KINDS[kind]

    def size_of(width: int, out: int) -> int:
        return out * width // 32 * (scale_bytes + code_bytes)

    def prepare(width: int, out: int, rows: int, count: int) -> Run:
        g = _functions()
        backend = g["ggml_backend_cpu_init"]()
        g["ggml_backend_cpu_set_n_threads"](backend, threads)
        device, types = _buffer_types(g, backend)
        generator = np.random.default_rng(0)

        def context() -> int:
            return int(g["ggml_init"](_Params(1 << 20, None, True)))

        def layer(buffer_type: int) -> tuple[int, int]:
            """Return a graph of one product, and its weight; (0, 0) where this kind of buffer cannot hold it."""
            weights, rest = context(), context()
            weight = g["ggml_new_tensor_2d"](weights, number, width, out)
            held = g["ggml_backend_alloc_ctx_tensors_from_buft"](weights, buffer_type)
            x = g["ggml_new_tensor_2d"](rest, _F32, width, rows)
            y = g["ggml_mul_mat"](rest, weight, x)
            graph = g["ggml_new_graph"](rest)
            g["ggml_build_forward_expand"](graph, y)
            plain = g["ggml_backend_alloc_ctx_tensors_from_buft"](rest, types[-1])
            if not held or not g["ggml_backend_dev_supports_op"](device, y):
                for buffer in filter(None, (held, plain)):
                    g["ggml_backend_buffer_free"](buffer)
                return 0, 0
            blocks = generator.integers(
                0, 256, (size_of(width, out) // (scale_bytes + code_bytes), scale_bytes + code_bytes), np.uint8
            )
            blocks[:, scale_bytes - 1] = scale
            values = generator.standard_normal((rows, width), dtype=np.float32)
            for tensor, data in ((weight, blocks), (x, values)):
                g["ggml_backend_tensor_set"](tensor, data.ctypes.data, 0, data.nbytes)
            return graph, weight

        chosen = next(buffer_type for buffer_type in types if layer(buffer_type)[0])
        graphs = [layer(chosen)[0] for _ in range(count)]
        return lambda i: g["ggml_backend_graph_compute"](backend, graphs[i % count])

    return Contender(f"llama.cpp {kind}, int8 inputs", size_of, prepare)


def speeds(path: Path, threads: int, prompt: list[int], new: int) -> tuple[float, float]:
    """Return (prompt, decoding) tokens a second of llama.cpp on the GGUF file at ``path``; the tokens of ``prompt`` come again."""
    model = opened(str(path), threads, len(prompt) + new + 8)
    model.reset()
    start = time.perf_counter()
    model.eval(prompt)
    middle = time.perf_counter()
    for i in range(new):
        model.eval([prompt[i % len(prompt)]])
    return len(prompt) / (middle - start), new / (time.perf_counter() - middle)


@lru_cache(maxsize=1)
def opened(path: str, threads: int, context: int) -> Any:
    """Return the model; ``opened.cache_clear()`` frees it, which llama_cpp wants done before the interpreter ends."""
    import llama_cpp

    size = {"n_ctx": context, "n_batch": context, "n_ubatch": 512}
    model = llama_cpp.Llama(path, **size, n_threads=threads, n_threads_batch=threads, flash_attn=True, verbose=False)
    model.eval([1])
    return model
