"""``llm-fp4 quantize``: a float model to a packed checkpoint."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_fp4 import ranks
from llm_fp4.cli import options
from llm_fp4.cli.budget import average, print_budget
from llm_fp4.cli.failures import Interrupted
from llm_fp4.cli.prefix import prefix_line
from llm_fp4.cli.render import print_facts, print_json, size
from llm_fp4.cli.working import working
from llm_fp4.errors import OutputError
from llm_fp4.recipe import Recipe

if TYPE_CHECKING:  # importing the library takes a second, which --help need not wait
    from llm_fp4.api import Estimate


class Propagation(StrEnum):
    """What each block reads: the quantized blocks' output before it, or the float model's."""

    sequential = "sequential"
    parallel = "parallel"


class Objective(StrEnum):
    """What makes an error small: each output's own, or that times the squared gradient of the model's loss."""

    output = "output"
    fisher = "fisher"


def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A hub name, a directory, or a .gguf file.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The checkpoint directory to write; must not exist.")],
    recipe: options.RecipeName = "fpq",
    bits: options.BitsOption = None,
    lm_head_bits: options.LmHeadBits = None,
    attention: options.Attention = None,
    average_bits: options.AverageBits = None,
    max_bytes: options.MaxBytes = None,
    max_kl: options.MaxKl = None,
    cache_bits: options.CacheBits = None,
    calibration: options.CalibrationSource = None,
    sequences: options.Sequences = None,
    length: options.Length = None,
    ignore: options.Ignore = None,
    targets: options.Targets = None,
    rounds: Annotated[
        int | None, typer.Option("--rounds", min=1, metavar="N", show_default=False, help="Rounds of the search.  [default: 3]")
    ] = None,
    propagation: Annotated[
        Propagation | None,
        typer.Option(
            "--propagation", show_default=False, help="Calibrate each block on quantized or on float inputs.  [default: sequential]"
        ),
    ] = None,
    objective: Annotated[
        Objective | None,
        typer.Option(
            "--objective",
            show_default=False,
            help="Errors of outputs, or the same weighted by the loss's squared gradient (the float model whole in memory).  [default: output]",
        ),
    ] = None,
    seed: options.Seed = None,
    device: options.Device = "cpu",
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="Print the size, memory and time this would take, and write nothing.")
    ] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Quantize the model SRC and write the checkpoint OUT.

    Options override the recipe's fields. An interrupted run is continued by the same command; its finished blocks lie in OUT.partial.
    Started by torchrun, N processes share the run and write the same bytes as one with as many threads as each.

    \b
    Examples:
      llm-fp4 quantize HuggingFaceTB/SmolLM2-135M-Instruct smollm-fp4
      llm-fp4 quantize ./model out --bits 4/4/8 --calibration text.txt
      llm-fp4 quantize model.gguf out --recipe minmax-int --ignore lm_head
      llm-fp4 quantize ./model out --average-bits 4.5 --calibration text.txt
      torchrun --nproc-per-node 2 -m llm_fp4 quantize ./model out
    """
    with ranks.joined(device):
        wish = options.recipe_of(
            recipe, bits=bits, lm_head_bits=lm_head_bits, calibration=calibration, sequences=sequences, length=length, ignore=ignore,
            targets=targets, attention=attention, cache_bits=cache_bits, rounds=rounds, propagation=propagation.value if propagation else None,
            objective=objective.value if objective else None, seed=seed, average_bits=average_bits, max_bytes=max_bytes, max_kl=max_kl,
        )  # fmt: skip
        import llm_fp4
        from llm_fp4.calibration import check_source

        check_source(wish.calibration.source)

        if plan_only:
            if ranks.leads():
                _plan(source, out, wish, device, as_json)
            return
        began = time.monotonic()
        try:
            model = _announced(source, out, wish, device) if not quiet and ranks.leads() else source
            with working(quiet or not ranks.leads()) as progress:
                made = llm_fp4.quantize(model, out, wish, device=device, progress=progress)
        except KeyboardInterrupt:
            raise Interrupted("interrupted; finished blocks are kept, and the same command continues after them") from None
        if ranks.leads():
            _print_result(made, out, time.monotonic() - began, as_json)


def _print_result(made: Path, out: str, seconds: float, as_json: bool) -> None:
    """Print what was written, and in how many seconds."""
    from llm_fp4 import inspect_model

    found = inspect_model(made)
    packed = [layer for layer in found.layers if layer.weight]
    weights = Counter(layer.weight[0] for layer in packed)
    inputs = Counter(layer.input[0] if layer.input else "float" for layer in packed if layer.kind == "linear")
    if as_json:
        print_json({
            "out": str(made), "recipe": found.recipe, "method": found.method, "bits": found.bits, "float_bytes": found.float_bytes,
            "bytes": found.bytes, "seconds": seconds, "layers": len(packed), "float_layers": len(found.layers) - len(packed),
            "weight_formats": weights, "input_formats": inputs, "average_bits": asdict(found.average), "budget": found.budget, "prefix": found.prefix,
        })  # fmt: skip
        return
    ratio = f" ({found.float_bytes / found.bytes:.2f} times smaller)" if found.float_bytes else ""
    print_facts([
        ("checkpoint", out), ("recipe", f"{found.recipe} {found.bits}"), ("float model", size(found.float_bytes)),
        ("on disk", size(found.bytes) + ratio), ("seconds", f"{seconds:.1f}"),
        ("layers", f"{len(packed)} quantized, {len(found.layers) - len(packed)} left in float"),
        ("weight formats", _counts(weights)), ("input formats", _counts(inputs)), ("average bits", average(found.average)),
        *([("prefix", line)] if (line := prefix_line(found.prefix)) else []),
    ])  # fmt: skip
    print_budget(found.budget)


def _announced(source: str, out: str, wish: Recipe, device: str) -> Any:
    """Return the model of a run, opened where no other process opens it too, after saying on stderr what the whole run costs."""
    from llm_fp4.api import estimate, gradient_memory
    from llm_fp4.models import find_structure, open_model

    if Path(out).exists():
        return source  # refused, or found to be finished
    with working(True):
        opened = open_model(source)
        cost = estimate(opened, wish, device=device)
    typer.echo(f"{wish.name} {wish.widths}: {_work(cost)}, {_minutes(cost)} minutes, {_memory(cost)}", err=True)
    if wish.search.objective == "fisher":
        need = gradient_memory(opened.model, find_structure(opened.model), wish.calibration.length)
        typer.echo(f"objective fisher differentiates the whole float model first: about {size(need)} of memory", err=True)
    return opened if ranks.alone() else source


def _plan(source: str, out: str, wish: Recipe, device: str, as_json: bool) -> None:
    """Print what a run would cost.

    Raises:
        OutputError: it would be refused, for there is something at ``out``.
    """
    from llm_fp4.api import estimate

    if Path(out).exists():
        raise OutputError(f"{out} exists already; remove it or choose another output")
    cost = estimate(source, wish, device=device)
    if as_json:
        print_json(asdict(cost))
        return
    print_facts([
        ("recipe", f"{wish.name} {wish.widths}"),
        *([("prefix", line)] if (line := prefix_line(wish.prefix_wish)) else []), ("float model", size(cost.float_bytes)),
        ("on disk", f"{size(cost.bytes)} ({cost.float_bytes / cost.bytes:.2f} times smaller)"),
        ("memory", _memory(cost)), ("work", _work(cost)), ("minutes", _minutes(cost)),
    ])  # fmt: skip


def _work(cost: Estimate) -> str:
    return f"about {cost.passes:.0f} forward passes over the calibration tokens"


def _minutes(cost: Estimate) -> str:
    return f"about {cost.seconds / 60:.1f}"


def _memory(cost: Estimate) -> str:
    return f"about {size(cost.memory)} beside the program"


def _counts(formats: Counter[str]) -> str:
    return ", ".join(f"{n} {name.upper() if name != 'float' else name}" for name, n in formats.most_common()) or "none"
