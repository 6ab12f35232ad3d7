"""The app: its commands, and where every run of the program begins."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from llm_fp4 import __version__, ranks
from llm_fp4.cli.bench import bench
from llm_fp4.cli.evaluate import evaluate
from llm_fp4.cli.export import export
from llm_fp4.cli.failures import Commands, report
from llm_fp4.cli.generate import generate
from llm_fp4.cli.inspect import inspect
from llm_fp4.cli.quantize import quantize
from llm_fp4.cli.recipes import recipes
from llm_fp4.errors import RankError

app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)  # fmt: skip


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llm-fp4 {__version__}")
        raise typer.Exit


@app.callback()
def top(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Quantize transformers to 4-bit floating point, weights and activations, and run them.

    \b
    Examples:
      llm-fp4 quantize HuggingFaceTB/SmolLM2-135M-Instruct smollm-fp4
      llm-fp4 eval smollm-fp4 --text wiki.txt --reference HuggingFaceTB/SmolLM2-135M-Instruct
      llm-fp4 generate smollm-fp4 "The sea is"

    Exit codes: 0 done, 1 a problem named in one sentence, 2 wrong options or recipe, 130 interrupted. LLM_FP4_DEBUG=1 shows
    tracebacks.
    """
    if ranks.started() > 1 and context.invoked_subcommand != "quantize":
        raise RankError(f"torchrun starts only quantize as several processes; run llm-fp4 {context.invoked_subcommand} without it")


app.command("quantize")(quantize)
app.command("eval")(evaluate)
app.command("generate")(generate)
app.command("inspect")(inspect)
app.command("bench")(bench)
app.command("export")(export)
app.command("recipes")(recipes)


def run() -> None:
    """Run the command line; every failure ends in one sentence on stderr and a non-zero exit code."""
    try:
        app(prog_name="llm-fp4")
    except KeyboardInterrupt as error:  # outside a command: while the program starts or ends
        sys.exit(report(error))
