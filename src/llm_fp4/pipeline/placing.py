"""Modules put into a model for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from llm_fp4.models import set_module


@contextmanager
def placed(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Let ``modules`` stand in ``model`` under their names until the context ends; what stood there comes back."""
    before = {n: model.get_submodule(n) for n in modules}
    try:
        for n, m in modules.items():
            set_module(model, n, m)
        yield
    finally:
        for n, m in before.items():
            set_module(model, n, m)
