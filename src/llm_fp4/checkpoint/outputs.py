"""What finished blocks returned for every batch, on disk, until nothing needs it any more."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from llm_fp4.errors import OutputError
from llm_fp4.storage import read_tree, write_tree


class BlockOutputs:
    """Outputs by block name and batch number, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, block: str, batch: int, tree: Any) -> None:
        """Store what ``block`` returned for ``batch``.

        Raises:
            UnsupportedError: it holds an object that is neither a tensor nor a plain value.
        """
        place = self.folder / block
        place.mkdir(parents=True, exist_ok=True)
        write_tree(place / f"{batch:05d}.safetensors", tree, block)

    def load(self, block: str, batch: int) -> Any:
        """Return what ``block`` returned for ``batch``, over mapped files.

        Raises:
            OutputError: a file is missing or damaged.
        """
        path = self.folder / block / f"{batch:05d}.safetensors"
        try:
            return read_tree(path)
        except (SafetensorError, OSError, ValueError, KeyError):
            raise OutputError(
                f"{path} is damaged or missing, so the run cannot go on; remove the unfinished output and start again"
            ) from None

    def keep(self, blocks: Collection[str]) -> None:
        """Forget the outputs of all other blocks."""
        for place in self.folder.iterdir() if self.folder.is_dir() else ():
            if place.name not in blocks:
                shutil.rmtree(place, ignore_errors=True)
