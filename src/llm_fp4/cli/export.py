"""``llm-fp4 export``: a checkpoint in the format of another engine."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from typing import Annotated

import typer

from llm_fp4.cli import options
from llm_fp4.cli.render import print_facts, print_json, size
from llm_fp4.cli.working import working


class Target(StrEnum):
    """The formats that can be written."""

    openvino = "openvino"
    onnx = "onnx"
    compressed_tensors = "compressed-tensors"
    gguf = "gguf"
    humming = "humming"


def export(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint that llm-fp4 quantize wrote.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The directory to write; must not exist.")],
    to: Annotated[Target, typer.Option("--to", help="The engine to write for.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what the engine holds and what is left out.")] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write the checkpoint DIR for another engine, its weights bit for bit.

    Says first what the engine cannot hold. What it would have to round again is refused by name; an input side it has no place
    for is left out, and the result is weight-only.

    \b
    Examples:
      llm-fp4 export smollm-fp4 smollm-openvino --to openvino
      llm-fp4 export smollm-fp4 smollm-onnx --to onnx --dry-run
    """
    from llm_fp4.api import export as write
    from llm_fp4.api import hold

    with working(quiet) as progress:
        holding = hold(folder, to.value)
        if not quiet:
            for sentence in holding.dropped:
                typer.echo(f"left out: {sentence}", err=True)
        made = None if dry_run else write(folder, out, to.value, progress=progress)
    held = Counter(holding.containers.values())
    if as_json:
        written = {} if made is None else {"out": str(made.path), "bytes": made.bytes}
        print_json({**written, **holding.to_json()})
        return
    facts = [("target", holding.target), ("weights", ", ".join(f"{n} as {what}" for what, n in held.most_common()))]
    facts += [("left out", sentence) for sentence in holding.dropped]
    facts += [("note", sentence) for sentence in holding.notes]
    print_facts(facts if made is None else [("written", f"{made.path} ({size(made.bytes)})"), *facts])
