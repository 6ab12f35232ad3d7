"""Writing files that either are whole or are not there."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llm_fp4.errors import OutputError


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place when the block ends without an error.

    Raises:
        OutputError: the disk is full or the place cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise output_error(error, path) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def output_error(error: Exception, path: Path) -> OutputError:
    """Return the OutputError for a failed write to ``path``."""
    code, text = getattr(error, "errno", None), str(error)
    if code == errno.EFBIG or f"os error {errno.EFBIG})" in text:
        limit = "the file system or a limit (ulimit -f) allows no file that large"
        return OutputError(f"{path} was not written: {limit}; raise it and run the same command again, finished blocks are kept")
    if code in (errno.ENOSPC, errno.EDQUOT) or any(f"os error {n})" in text for n in (errno.ENOSPC, errno.EDQUOT)):
        return OutputError(
            f"the disk is full: {path} was not written; free some space and run the same command again, finished blocks are kept"
        )
    return OutputError(f"{path} cannot be written ({error}); check the directory and its permissions")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all."""
    whole: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        stored = tensor.detach().cpu().contiguous()
        whole[name] = stored.clone() if stored.untyped_storage().data_ptr() in seen else stored  # the format wants no sharing
        seen.add(stored.untyped_storage().data_ptr())
    with writing(path) as temporary:
        save_file(whole, temporary, metadata={"format": "pt"})
