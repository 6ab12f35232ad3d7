"""Time one linear layer: this package's products of packed weights beside torch in float32 and bfloat16.

All contenders of a shape run in turn within each round, so that a change of the machine's speed meets all of them;
the figures are medians over rounds, and ratios are medians of each round's ratio. "cold" cycles through more than
600 MB of distinct weights, as one token's way through a large model does; "cached" uses one weight again and again.

    python benchmarks/kernels.py --rows 1 128 --json
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.nn.functional import linear

from llm_fp4.kernels import block_linear, float_linear, quantized_block_linear, quantized_linear
from llm_fp4.kernels.compiled import select
from llm_fp4.numerics import packed_width, parse

SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096))  # (in, out)
COLD_BYTES = 640_000_000

Run = Callable[[int], Any]  # computes one layer with the i-th weight


@dataclass(frozen=True)
class Contender:
    """A way to compute the layer.

    Attributes:
        bytes_of: of one weight of (in, out).
        prepare: (in, out, rows, how many weights) to what runs it. A peer is added by adding one of these.
    """

    name: str
    bytes_of: Callable[[int, int], int]
    prepare: Callable[[int, int, int, int], Run]
    baseline: bool = False


def torch_linear(dtype: torch.dtype) -> Contender:
    def prepare(width: int, out: int, rows: int, count: int) -> Run:
        weights = [torch.randn(out, width).to(dtype) for _ in range(min(count, 3))]
        weights += [weights[i % 3].clone() for i in range(count - len(weights))]
        x = torch.randn(rows, width).to(dtype)
        return lambda i: linear(x, weights[i % count])

    return Contender(f"torch {str(dtype)[6:]}", lambda width, out: width * out * dtype.itemsize, prepare, baseline=True)


def packed(name: str, weight: str, input_format: str | None, max_shift: int = 0, dtype: torch.dtype = torch.float32) -> Contender:
    """Return the rounding and the integer product, or the weight-only product where ``input_format`` is None."""
    fmt = parse(weight)

    def prepare(width: int, out: int, rows: int, count: int) -> Run:
        weights = [torch.randint(0, 256, (out, packed_width(width, fmt.bits)), dtype=torch.uint8) for _ in range(count)]
        scale, x = torch.rand(out) + 0.5, torch.randn(rows, width).to(dtype)
        if input_format is None:
            return lambda i: float_linear(x, weights[i % count], scale, None, fmt.exponent_bits, fmt.mantissa_bits)
        source, step = parse(input_format), torch.tensor(0.25)
        shift = torch.randint(0, max_shift + 1, (width,), dtype=torch.uint8) if max_shift else None

        rounding = (step, shift, None, source.exponent_bits, source.mantissa_bits, True, max_shift, False)
        return lambda i: quantized_linear(x, *rounding, weights[i % count], scale, None, fmt.exponent_bits, fmt.mantissa_bits)

    return Contender(name, lambda width, out: out * packed_width(width, fmt.bits), prepare)


def block_scaled(name: str, size: int, scale_dtype: str, weight_only: bool = False) -> Contender:
    """Return the product of E2M1 weights with block scales and inputs that are quantized likewise, or stay float32."""

    def prepare(width: int, out: int, rows: int, count: int) -> Run:
        weights = [torch.randint(0, 256, (out, width // 2), dtype=torch.uint8) for _ in range(count)]
        scales = [torch.randint(100, 127, (out, width // size), dtype=torch.uint8) for _ in range(count)]
        x, second = torch.randn(rows, width), torch.tensor(2.0**-6) if scale_dtype == "e4m3" else None
        rounding = (torch.tensor(2.0**-6 if second is not None else 1.0), size, scale_dtype, 2, 1)
        rest = (second, None, size, scale_dtype, 2, 1)
        if weight_only:
            return lambda i: block_linear(x, weights[i % count], scales[i % count], *rest)
        return lambda i: quantized_block_linear(x, *rounding, weights[i % count], scales[i % count], *rest)

    return Contender(name, lambda width, out: width * out // 2 + width * out // size, prepare)


CONTENDERS = (
    torch_linear(torch.float32),
    torch_linear(torch.bfloat16),
    packed("W4A4 e2m1, shifts", "e2m1", "e2m1", 3),
    packed("W4A4 e3m0, shifts, two limbs", "e3m0", "e3m0", 7),
    packed("W4A8", "e2m1", "e1m6"),
    packed("W8A8", "e1m6", "e1m6"),
    packed("W4A16", "e2m1", None),
    packed("W4A16, bfloat16 inputs", "e2m1", None, dtype=torch.bfloat16),
    block_scaled("NVFP4 W4A4", 16, "e4m3"),
    block_scaled("MXFP4 W4A4", 32, "e8m0"),
    block_scaled("NVFP4 W4A16", 16, "e4m3", weight_only=True),
)


def seconds(run: Run, i: int, cold: bool = True) -> float:
    if not cold:  # the others' weights have filled the caches
        run(i)
        run(i)
    start = time.perf_counter()
    run(i)
    return time.perf_counter() - start


def read_bandwidth() -> Run:
    """Return what reads COLD_BYTES once, as fast as torch does."""
    data = torch.ones(COLD_BYTES // 8, dtype=torch.int64)
    return lambda i: data.sum()


def measure(
    width: int, out: int, rows: int, cold: bool, rounds: int, names: list[str], of: Sequence[Contender] = CONTENDERS
) -> list[dict[str, Any]]:
    """Return one record a contender: milliseconds, ratio to the faster baseline, and what it read in a second."""
    contenders = [c for c in of if c.baseline or not names or any(n in c.name for n in names)]
    counts = [1 + COLD_BYTES // c.bytes_of(width, out) if cold else 1 for c in contenders]
    runs = [c.prepare(width, out, rows, count) for c, count in zip(contenders, counts, strict=True)]
    read = read_bandwidth() if cold else None
    times: list[list[float]] = [[] for _ in contenders]
    bandwidth = []
    for i in range(rounds + 2):
        once = [seconds(run, i, cold) for run in runs]
        if i < 2:  # warming up
            continue
        for list_of_times, t in zip(times, once, strict=True):
            list_of_times.append(t)
        if read is not None and i % 8 == 2:
            bandwidth.append(COLD_BYTES / seconds(read, 0) / 1e9)
    fastest = [min(t[i] for t, c in zip(times, contenders, strict=True) if c.baseline) for i in range(rounds)]
    records = []
    for contender, t in zip(contenders, times, strict=True):
        gigabytes = contender.bytes_of(width, out) / median(t) / 1e9
        records.append(
            {
                "in": width, "out": out, "rows": rows, "cold": cold, "name": contender.name, "ms": median(t) * 1e3,
                "ratio": median(base / own for base, own in zip(fastest, t, strict=True)),
                "teraops": 2 * rows * width * out / median(t) / 1e12, "gigabytes_per_second": gigabytes,
                "share_of_read_bandwidth": gigabytes / median(bandwidth) if bandwidth else None,
            }
        )  # fmt: skip
    return records


def show(record: dict[str, Any]) -> str:
    share = record["share_of_read_bandwidth"]
    return (
        f"{record['in']:>6} x {record['out']:<6}{record['rows']:>5}  {'cold' if record['cold'] else 'cached':7}{record['name']:30}"
        f"{record['ms']:>9.3f} ms{record['ratio']:>7.2f} x{record['teraops']:>7.2f} Tops{record['gigabytes_per_second']:>7.1f} GB/s"
        + (f"{100 * share:>5.0f} %" if share is not None else "")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 128, 1024])
    parser.add_argument("--shape", type=int, nargs=2, metavar=("IN", "OUT"), action="append", help="default: three of LLaMA-7B")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="contenders whose name holds this, beside torch")
    parser.add_argument("--rounds", type=int, default=0, help="default: 60 for up to 8 rows, 9 for up to 256, else 5")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    kernels, records = select(), []
    if not options.json:
        print(
            f"{platform.processor() or platform.machine()}, {options.threads} threads, torch {torch.__version__}, kernels {kernels}"
        )
        print(
            "    in x out     rows         what"
            + " " * 37
            + "median   vs the faster of torch's two; weights read; of read bandwidth"
        )
    with torch.inference_mode():
        for rows in options.rows:
            for width, out in options.shape or SHAPES:
                for cold in (True, False) if rows <= 8 else (False,):
                    rounds = options.rounds or (60 if rows <= 8 else 9 if rows <= 256 else 5)
                    for record in measure(width, out, rows, cold, rounds, options.only):
                        records.append(record)
                        if not options.json:
                            print(show(record), flush=True)
    if options.json:
        print(
            json.dumps({"kernels": kernels, "threads": options.threads, "torch": torch.__version__, "records": records}, indent=1)
        )


if __name__ == "__main__":
    main()
