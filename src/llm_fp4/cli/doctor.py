"""``llm-fp4 doctor``: is a quantized checkpoint sound?"""

from __future__ import annotations

from typing import Annotated

import typer

from llm_fp4.cli import options
from llm_fp4.cli.render import print_facts, print_json
from llm_fp4.cli.working import working


def doctor(
    path: Annotated[
        str,
        typer.Argument(metavar="DIR|FILE", help="A directory of llm-fp4, compressed-tensors or ModelOpt (NVFP4), or a .gguf file."),
    ],
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference", metavar="SRC", show_default=False, help="The float model it was made from; tells more, and more surely."
        ),
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Say what is wrong with a quantized checkpoint, ours or another tool's, and what to do about it.

    Looks at the order of nibbles, at scales (zero, NaN, underflowing, inverted, unequal where engines fuse layers), at shapes, at
    layers left in float and at how often each code occurs. Exits with 1 where something is wrong.

    \b
    Examples:
      llm-fp4 doctor smollm-fp4
      llm-fp4 doctor model.gguf --reference ./model --json
    """
    from llm_fp4.api import diagnose
    from llm_fp4.export.holding import some

    with working(quiet) as progress:
        found = diagnose(path, reference, progress=progress)
    if as_json:
        print_json(found.to_json())
    else:
        weights = ", ".join(f"{n} {kind}" for kind, n in found.weights.items()) or "none"
        print_facts([("checkpoint", f"{path} ({found.kind})"), ("weights", weights)])
        for each in found.findings:
            print(f"{'WRONG' if each.wrong else 'note '}  {each.check}: {some(each.where)}: {each.seen}.\n       -> {each.remedy}.")
        for sentence in found.known:
            print(f"known  {sentence}.")
        print("Something is wrong." if found.wrong else "Nothing wrong was found.")
    if found.wrong:
        raise typer.Exit(1)
