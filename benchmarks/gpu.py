"""Time one linear layer on a GPU: this package's Triton kernels beside torch in bfloat16, cuBLAS int8 and a plain copy.

    python benchmarks/gpu.py --json

All contenders of a shape run in turn within each round, over more distinct weights than the last-level cache holds, and
times are those of the device's own clock; figures are medians, ratios medians of each round's ratio. Before it is timed,
each integer product is compared with the reference bodies: they must be equal.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from common import record
from torch.nn.functional import linear

from llm_fp4.kernels import ops
from llm_fp4.numerics import packed_width, parse

SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096))  # (in, out)
COLD_BYTES = 640_000_000

Run = Callable[[int], Any]


def contenders(width: int, out: int, rows: int) -> dict[str, tuple[Run, int]]:
    """Return what runs the layer with its i-th weight, and the bytes of that weight, by name."""
    x = torch.randn(rows, width, device="cuda")
    narrow = x.bfloat16()
    found: dict[str, tuple[Run, int]] = {}
    dense = [torch.randn(out, width, device="cuda", dtype=torch.bfloat16) for _ in range(2 + COLD_BYTES // (2 * width * out))]
    found["torch bfloat16"] = (lambda i: linear(narrow, dense[i % len(dense)]), 2 * width * out)
    if rows > 16:
        whole = [
            torch.randint(-127, 128, (out, width), device="cuda", dtype=torch.int8) for _ in range(2 + COLD_BYTES // (width * out))
        ]
        levels8 = torch.randint(-127, 128, (rows, width), device="cuda", dtype=torch.int8)
        found["torch int8 product alone"] = (lambda i: torch._int_mm(levels8, whole[i % len(whole)].t()), width * out)
    for name, weight, source, shift in (
        ("W4A4 e2m1, shifts", "e2m1", "e2m1", 3), ("W4A4 e3m0, two limbs", "e3m0", "e3m0", 7), ("W4A8", "e2m1", "e1m6", 0),
        ("W8A8", "e1m6", "e1m6", 0),
    ):  # fmt: skip
        found[name] = _ours(x, out, weight, source, shift)
    fmt = parse("e2m1")
    codes, scale = _codes(out, width, 4)
    found["W4A16"] = (
        lambda i: ops.float_linear(x, codes[i % len(codes)], scale, None, fmt.exponent_bits, fmt.mantissa_bits),
        codes[0].nbytes,
    )
    return found


def _codes(out: int, width: int, bits: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    shape = (out, packed_width(width, bits))
    count = 2 + COLD_BYTES // (shape[0] * shape[1])
    codes = [torch.randint(0, 256, shape, device="cuda", dtype=torch.uint8) for _ in range(count)]
    return codes, torch.rand(out, device="cuda") + 0.5


def _ours(x: torch.Tensor, out: int, weight: str, source: str, limit: int) -> tuple[Run, int]:
    fmt, read = parse(weight), parse(source)
    width = x.shape[1]
    codes, scale = _codes(out, width, fmt.bits)
    shift = torch.randint(0, limit + 1, (width,), device="cuda", dtype=torch.uint8) if limit else None
    rounding = (torch.tensor(0.25, device="cuda"), shift, None, read.exponent_bits, read.mantissa_bits, True, limit, False)
    weight_format = (fmt.exponent_bits, fmt.mantissa_bits)

    def run(i: int) -> torch.Tensor:
        levels, step = ops.quantize_input(x, *rounding)
        product: torch.Tensor = ops.int_linear(levels, step, codes[i % len(codes)], scale, None, *weight_format)
        return product

    expected_levels, step = ops.quantize_input_reference(x, *rounding)
    expected = ops.int_linear_reference(expected_levels, step, codes[0], scale, None, *weight_format)
    if not torch.equal(run(0), expected):
        raise SystemExit(f"{weight} weights with {source} inputs differ from the reference at {len(x)} x {width} x {out}")
    return run, codes[0].nbytes


def seconds(run: Run, i: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run(i)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def copy_bandwidth() -> float:
    """Return the bytes a second that a plain copy reads and writes."""
    data = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(data)
    return 2 * data.nbytes / median(seconds(lambda i: target.copy_(data), 0) for _ in range(20))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 128, 1024, 8192])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", action="store_true", help="also write benchmarks/results/gpu.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU is visible to torch; this benchmark needs one")
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s")
    records: list[dict[str, Any]] = [{"device": torch.cuda.get_device_name(), "copy_bytes_per_second": bandwidth}]
    with torch.inference_mode():
        for rows in options.rows:
            for width, out in SHAPES:
                found = contenders(width, out, rows)
                times: dict[str, list[float]] = {name: [] for name in found}
                for i in range(options.rounds + 3):
                    for name, (run, _) in found.items():
                        t = seconds(run, i)
                        if i >= 3:  # after warming up
                            times[name].append(t)
                for name, t in times.items():
                    ratio = median(base / own for base, own in zip(times["torch bfloat16"], t, strict=True))
                    share = found[name][1] / median(t) / bandwidth
                    ops_per_second = 2 * rows * width * out / median(t)
                    records.append(
                        {"rows": rows, "in": width, "out": out, "name": name, "seconds": median(t), "ratio": ratio,
                         "share_of_copy_bandwidth": share, "ops_per_second": ops_per_second}
                    )  # fmt: skip
                    print(
                        f"{width:>6} x {out:<6}{rows:>5} {name:26}{median(t) * 1e6:>9.1f} us{ratio:>7.2f} x"
                        f"{100 * share:>5.0f} % of copy{ops_per_second / 1e12:>8.1f} Tops"
                    )
                del found
                torch.cuda.empty_cache()
    if options.json:
        record("gpu", records)


if __name__ == "__main__":
    main()
