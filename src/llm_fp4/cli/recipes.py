"""``llm-fp4 recipes``: the named recipes, or one of them as YAML."""

from __future__ import annotations

from typing import Annotated

import typer

from llm_fp4.cli import options
from llm_fp4.cli.render import print_facts, print_json
from llm_fp4.recipe import SUMMARIES, dump_recipe, load_recipe


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The recipe to print.", show_default=False)] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """List the named recipes, or print NAME as YAML to edit and pass to --recipe.

    \b
    Examples:
      llm-fp4 recipes
      llm-fp4 recipes fpq > mine.yaml
    """
    if name is None:
        if as_json:
            print_json({"recipes": SUMMARIES})
        else:
            print_facts(list(SUMMARIES.items()))
        return
    recipe = load_recipe(name)
    if as_json:
        print_json(recipe.model_dump(mode="json"))
    else:
        print(dump_recipe(recipe), end="")
