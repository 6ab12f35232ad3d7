"""Looking into a model without running it: what is quantized and how, or what would be, and what stays float and why."""

from __future__ import annotations

from pathlib import Path

from llm_fp4.api.loading import is_checkpoint
from llm_fp4.api.reports import Inspection
from llm_fp4.api.stored_report import stored_report
from llm_fp4.api.wished_report import wished_report
from llm_fp4.models import FloatModel, open_model
from llm_fp4.recipe import Recipe, load_recipe


def inspect_model(source_or_dir: str | Path | FloatModel, recipe: Recipe | str = "fpq") -> Inspection:
    """Return what a checkpoint holds, or what ``recipe`` would make of a float model.

    Args:
        source_or_dir: a directory llm-fp4 wrote; or a float model by directory, hub name or .gguf file, or opened.
        recipe: only for a float model.
    Raises:
        CheckpointError, SourceError: it cannot be read. RecipeError: the recipe does not fit it.
        UnsupportedError: the model has nothing that can be quantized block by block.
    """
    if not isinstance(source_or_dir, FloatModel):
        if is_checkpoint(source_or_dir):
            return stored_report(Path(source_or_dir))
        source_or_dir = open_model(str(source_or_dir))
    return wished_report(source_or_dir, recipe if isinstance(recipe, Recipe) else load_recipe(recipe))
