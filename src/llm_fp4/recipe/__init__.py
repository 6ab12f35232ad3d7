"""Recipe: what the user wishes. Validated before anything is loaded; unknown keys are refused."""

from llm_fp4.recipe.budget import Budget
from llm_fp4.recipe.check import validated
from llm_fp4.recipe.files import dump_recipe, load_recipe
from llm_fp4.recipe.patterns import matches
from llm_fp4.recipe.presets import PRESETS, SUMMARIES
from llm_fp4.recipe.schema import ModuleRule, Recipe
from llm_fp4.recipe.sections import (
    FLOAT_BITS,
    AttentionRules,
    Bits,
    CacheRules,
    Calibration,
    InputRules,
    Override,
    SearchRules,
    ShiftRange,
    TransformRules,
    WeightRules,
)

__all__ = [
    "FLOAT_BITS", "PRESETS", "SUMMARIES", "AttentionRules", "Bits", "Budget", "CacheRules", "Calibration", "InputRules", "ModuleRule", "Override", "Recipe",
    "SearchRules", "ShiftRange", "TransformRules", "WeightRules", "dump_recipe", "load_recipe", "matches", "validated",
]  # fmt: skip
