"""Reading a recipe by name or from a YAML file, and writing one."""

from __future__ import annotations

from pathlib import Path

import yaml

from llm_fp4.errors import RecipeError
from llm_fp4.recipe.check import validated
from llm_fp4.recipe.presets import PRESETS
from llm_fp4.recipe.schema import Recipe


def load_recipe(name_or_path: str) -> Recipe:
    """Return a named recipe, or the recipe of a YAML file.

    Raises:
        RecipeError: no such name or file, not YAML, or a key or value the schema refuses.
    """
    if name_or_path in PRESETS:
        return Recipe.model_validate({"name": name_or_path, **PRESETS[name_or_path]})
    path = Path(name_or_path)
    if not path.is_file():
        raise RecipeError(f"no recipe {name_or_path!r}: neither a file nor one of {', '.join(PRESETS)}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path} must be a mapping of recipe keys, such as 'method: fpq'")
    recipe: Recipe = validated(Recipe, data, str(path))
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML that :func:`load_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
