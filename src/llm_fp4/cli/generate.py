"""``llm-fp4 generate``: a prompt continued, shown as it is written."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from llm_fp4.cli import options
from llm_fp4.cli.render import print_json
from llm_fp4.cli.working import working


def generate(
    path: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint of llm-fp4, or a float model.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, metavar="N", help="Stop after this many tokens.")] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, metavar="T", help="0 takes the likeliest token; above, sample.")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    device: options.Device = "cpu",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Continue PROMPT with the model DIR, streaming the text.

    \b
    Examples:
      llm-fp4 generate smollm-fp4 "The sea is" --max-new-tokens 40
      llm-fp4 generate smollm-fp4 "Why is the sky blue?" --chat --temperature 0.7
    """
    from llm_fp4 import api

    out = sys.stdout

    def show(piece: str) -> None:
        out.write(piece)
        out.flush()

    with working(quiet) as progress:
        loaded = api.load_any(path, device=device, progress=progress)
    began = time.monotonic()
    with working(quiet=True):
        text = api.generate_text(
            loaded,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            chat=chat,
            on_text=None if as_json else show,
        )
    if as_json:
        print_json({"path": path, "prompt": prompt, "text": text, "seconds": time.monotonic() - began})
    else:
        print()
