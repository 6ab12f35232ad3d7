"""Post-training 4-bit floating-point quantization of transformers, weights and activations.

Importing this package is light: names load when they are used, and transformers learns to read our checkpoints when it
is imported itself.
"""

from __future__ import annotations

import importlib
from typing import Any

from llm_fp4.integrations.register import register_when_imported

__version__ = "0.1.0"

_WHERE = {
    "quantize": "llm_fp4.api", "quantize_module": "llm_fp4.api", "load": "llm_fp4.api", "evaluate": "llm_fp4.api",
    "export": "llm_fp4.api", "inspect_model": "llm_fp4.api", "Recipe": "llm_fp4.recipe", "load_recipe": "llm_fp4.recipe",
    "FloatFormat": "llm_fp4.numerics", "LlmFp4Error": "llm_fp4.errors",
}  # fmt: skip

__all__ = sorted([*_WHERE, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'llm_fp4' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


register_when_imported()
