"""What a block returns, on disk: tensors in a safetensors file, the tuples, numbers and names around them as JSON beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from llm_fp4.errors import UnsupportedError
from llm_fp4.storage.write import write_json, write_tensors


def write_tree(path: Path, tree: Any, name: str) -> None:
    """Write ``tree``, a tensor or nested tuples, lists and dicts of tensors and plain values.

    Raises:
        UnsupportedError: it holds an object of another kind; the message says that ``name`` returns it.
    """
    tensors: dict[str, Tensor] = {}
    write_json(path.with_suffix(".json"), _flat(tree, tensors, name))
    write_tensors(path, tensors)


def read_tree(path: Path) -> Any:
    """Return what :func:`write_tree` wrote; its tensors lie over the mapped file."""
    return _whole(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")), load_file(path))


def _flat(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value
        return {"tensor": key}
    if value is None or type(value) in (bool, int, float, str):
        return {"plain": value}
    if isinstance(value, tuple | list):  # torch.Size among them
        return {"list" if isinstance(value, list) else "tuple": [_flat(v, tensors, name) for v in value]}
    if type(value) is dict:
        return {"dict": {k: _flat(v, tensors, name) for k, v in value.items()}}
    raise UnsupportedError(
        f"{name} returns a {type(value).__name__}, which cannot be kept between blocks; return tensors in a tuple"
    )


def _whole(spec: Any, tensors: dict[str, Tensor]) -> Any:
    ((kind, value),) = spec.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "plain":
        return value
    if kind == "dict":
        return {k: _whole(v, tensors) for k, v in value.items()}
    inner = [_whole(v, tensors) for v in value]
    return inner if kind == "list" else tuple(inner)
