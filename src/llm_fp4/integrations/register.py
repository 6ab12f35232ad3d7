"""Registering with transformers when, and only when, the user's program imports its quantizers.

``import llm_fp4`` must stay light, yet afterwards ``AutoModel.from_pretrained`` must know our checkpoints whichever of
the two was imported first.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_WATCHED = "transformers.quantizers.auto"


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds the watched module as usual, and registers once it has run."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _WATCHED:
            return None
        sys.meta_path.remove(self)  # once is enough, and the search below must not find this finder again
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            register()

        # on this one loader object only (mypy takes a method for a constant); a wrapper would hide what else loaders offer
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Make transformers know ``quant_method: "llm_fp4"`` now."""
    importlib.import_module("llm_fp4.integrations.transformers")


def register_when_imported() -> None:
    """Register now if transformers' quantizers are loaded, otherwise as soon as they are."""
    if _WATCHED in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _AfterImport())
