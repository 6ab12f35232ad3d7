"""``llm-fp4 bench``: tokens a second, memory, and the share of the machine they use."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from llm_fp4.cli import options
from llm_fp4.cli.render import print_facts, print_json, print_table, size
from llm_fp4.cli.working import working

if TYPE_CHECKING:
    from llm_fp4.api import Benchmark


def bench(
    path: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint of llm-fp4, or a float model.")],
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference", metavar="SRC", show_default=False, help="The float model, run in bfloat16 and float32 beside it."
        ),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, metavar="N", help="Length of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, metavar="N", help="Tokens decoded after it.")] = 32,
    repeats: Annotated[int, typer.Option("--repeats", min=1, metavar="N", help="Medians are taken over so many runs.")] = 3,
    device: options.Device = "cpu",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure how fast the model DIR runs on this machine, one sequence at a time.

    \b
    Examples:
      llm-fp4 bench smollm-fp4
      llm-fp4 bench smollm-fp4 --reference HuggingFaceTB/SmolLM2-135M-Instruct --json
    """
    from llm_fp4 import api

    with working(quiet) as progress:
        found = api.benchmark(
            path, reference=reference, prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats, device=device,
            progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(asdict(found))
    else:
        _show(found)


def _show(found: Benchmark) -> None:
    machine = found.machine
    print_facts(
        [
            ("device", f"{machine.device}, {machine.threads} threads, kernels {machine.kernels}"),
            ("memory read", f"{machine.gigabytes_per_second:.1f} GB/s"),
            ("int8 peak", f"{machine.int8_teraops:.2f} Tops"),
        ]
    )
    first = found.models[0]
    rows = [
        (
            m.name, m.prefill, first.prefill / m.prefill, m.decode,
            first.decode / m.decode if first.decode and m.decode else None, m.runs or "", size(m.weight_bytes),
            first.weight_bytes / m.weight_bytes, m.share_of_bandwidth, m.share_of_int8_peak,
        )
        for m in found.models
    ]  # fmt: skip
    columns = (
        f"model, {found.prompt_tokens} + {found.new_tokens} tokens", "prefill tok/s", "ours / it", "decode tok/s", "ours / it", "decoded by",
        "weights", "ours / it", "of bandwidth", "of int8 peak",
    )  # fmt: skip
    print_table(columns, rows)
