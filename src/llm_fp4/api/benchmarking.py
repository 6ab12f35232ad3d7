"""How fast a model runs here: prompt and decoding speed, and what share of the machine that is."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from llm_fp4.api.loading import load_any
from llm_fp4.api.prepare import checked_device
from llm_fp4.errors import UnsupportedError
from llm_fp4.integrations.decoder import Decoder
from llm_fp4.kernels import int_linear
from llm_fp4.kernels.compiled import available, select
from llm_fp4.models import continued
from llm_fp4.nn import QuantLinear
from llm_fp4.numerics import int8_product, packed_width
from llm_fp4.progress import Progress, silent

_READ_BYTES = 256_000_000
_SIDE = 1024  # of the square int8 product that stands for the peak
STAGE = "measure"


@dataclass(frozen=True)
class Machine:
    """What the model is measured against: the best run of reading memory and of multiplying int8 here."""

    device: str
    threads: int
    kernels: str
    gigabytes_per_second: float
    int8_teraops: float


@dataclass(frozen=True)
class Speed:
    """One model, or one dtype of the reference.

    Attributes:
        prefill, decode: tokens a second, medians; ``decode`` None for models that do not generate.
        runs: what decodes: "compiled" blocks or "transformers".
        weight_bytes: of all parameters and buffers in memory, shared ones once.
        share_of_bandwidth: bytes of the linears times ``decode``, over what memory gives.
        share_of_int8_peak: operations of the linears that the whole prompt runs through, times ``prefill``, over the int8 peak;
            None for float models.
    """

    name: str
    prefill: float
    decode: float | None
    runs: str | None
    weight_bytes: int
    share_of_bandwidth: float | None
    share_of_int8_peak: float | None


@dataclass(frozen=True)
class Benchmark:
    """What was measured: the machine, each model on it, and over how many tokens."""

    machine: Machine
    prompt_tokens: int
    new_tokens: int
    models: list[Speed]


def benchmark(
    path: str | Path, *, reference: str | Path | None = None, prompt_tokens: int = 128, new_tokens: int = 32, repeats: int = 3,
    device: str = "cpu", progress: Progress = silent,
) -> Benchmark:  # fmt: skip
    """Return the speed of the model ``path``, one sequence at a time, and of ``reference`` in bfloat16 and in float32.

    Args:
        prompt_tokens: of the prompt that prefill measures and decoding continues. repeats: medians are taken over so many.
    Raises:
        CheckpointError, SourceError: a model cannot be loaded. UnsupportedError: it does not read token ids.
    """
    machine = _machine(device, repeats)
    runs = [str(path)] + ([] if reference is None else ["float32", "bfloat16"])
    models: list[Speed] = []
    loaded = None
    for i, name in enumerate(runs):
        progress(STAGE, i, len(runs))
        if i < 2:
            loaded = None  # before the next one is read
            loaded = load_any(path if i == 0 else str(reference), device=device)
        assert loaded is not None
        if name == "bfloat16":
            loaded.model.to(torch.bfloat16)
        models.append(_speed(name, loaded.model, loaded.quantized, machine, prompt_tokens, new_tokens, repeats))
    progress(STAGE, len(runs), len(runs))
    return Benchmark(machine, prompt_tokens, new_tokens, models)


def _machine(device: str, repeats: int) -> Machine:
    """Return the measured bandwidth and int8 peak of ``device``."""
    where = checked_device(device)
    data = torch.ones(_READ_BYTES // 8, dtype=torch.int64, device=where)
    read = _seconds(lambda: data.sum(), where, repeats + 4, min)
    a = torch.randint(-96, 97, (_SIDE, _SIDE), dtype=torch.int8, device=where)
    seconds = [_seconds(lambda: int8_product(a, a), where, repeats + 4, min)]
    if where.type == "cpu":  # torch's product and ours, whichever is faster
        packed = torch.randint(0, 256, (_SIDE, packed_width(_SIDE, 4)), dtype=torch.uint8)
        one, step = torch.ones(_SIDE), torch.ones(1, 1)
        seconds.append(_seconds(lambda: int_linear(a, step, packed, one, None, 2, 1), where, repeats + 4, min))
    kernels = select() if where.type == "cpu" and available() else "torch"
    return Machine(str(where), torch.get_num_threads(), kernels, _READ_BYTES / read / 1e9, 2 * _SIDE**3 / min(seconds) / 1e12)


def _speed(name: str, model: Any, quantized: bool, machine: Machine, prompt: int, new: int, repeats: int) -> Speed:
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise UnsupportedError(f"{name} is a {type(model).__name__}, which does not read token ids; only such models are measured")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (prompt,), generator=generator)
    decoder = _decoder(model, prompt + new) if quantized else None
    where = torch.device(machine.device)
    with torch.inference_mode():
        prefill = prompt / _seconds(lambda: _prefill(model, ids.to(where)), where, repeats)
        decode = None
        if hasattr(model, "generate") and model.can_generate():
            decode = median(_decode(model, decoder, ids, new, where) for _ in range(repeats))
    parts = _linears(model)
    read = None if decode is None else sum(p[0] for p in parts) * decode / 1e9 / machine.gigabytes_per_second
    head = model.get_output_embeddings() if _keeps_logits(model) else None  # a prompt's head runs for one token
    ops = 2 * (sum(p[1] for p in parts) - _elements(head)) * prefill / 1e12 / machine.int8_teraops
    runs = None if decode is None else "transformers" if decoder is None else "compiled"
    return Speed(name, prefill, decode, runs, _bytes(model), read, ops if quantized else None)


def _decoder(model: Any, capacity: int) -> Decoder | None:
    try:
        return Decoder(model, capacity)
    except UnsupportedError:
        return None


def _prefill(model: Any, ids: Tensor) -> Tensor:
    """Run the prompt, with the logits of the last token alone where the model can leave the others out."""
    last = {"logits_to_keep": 1} if _keeps_logits(model) else {}
    out: Tensor = model(ids[None], **last)[0]
    return out


def _keeps_logits(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _decode(model: Any, decoder: Decoder | None, ids: Tensor, new: int, where: torch.device) -> float:
    """Return the tokens a second of greedy decoding after the prompt, whose time does not count."""
    if decoder is not None:
        token = int(decoder.prompt(ids).argmax())
        began = time.perf_counter()
        for _ in range(new):
            token = int(decoder.step(token).argmax())
        return new / (time.perf_counter() - began)
    logits, cache = continued(model, ids.to(where)[None], None)
    _wait(where)
    began = time.perf_counter()
    for _ in range(new):
        logits, cache = continued(model, logits[:, -1:].argmax(-1), cache)
    int(logits[0, -1].argmax())
    return new / (time.perf_counter() - began)


def _linears(model: nn.Module) -> list[tuple[int, int]]:
    """Return the bytes and elements of every linear's weight."""
    out = []
    for module in model.modules():
        if isinstance(module, QuantLinear):
            out.append((module.weight_packed.nbytes + module.weight_scale.nbytes, _elements(module)))
        elif isinstance(module, nn.Linear):
            out.append((module.weight.nbytes, _elements(module)))
    return out


def _elements(linear: nn.Module | None) -> int:
    return linear.in_features * linear.out_features if isinstance(linear, nn.Linear | QuantLinear) else 0


def _bytes(model: nn.Module) -> int:
    found = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(found.values())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(run: Callable[[], object], device: torch.device, repeats: int, of: Callable[[list[float]], float] = median) -> float:
    """Return the median seconds of ``run``, or the least of them, after one run for warmth."""
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - began)
    return of(times[1:])
