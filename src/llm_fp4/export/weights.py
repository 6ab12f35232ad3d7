"""The quantized weights of a checkpoint directory, read as they are stored."""

from __future__ import annotations

from pathlib import Path

from llm_fp4.checkpoint import Manifest
from llm_fp4.errors import CheckpointError
from llm_fp4.numerics import PerRow, QuantizedTensor
from llm_fp4.storage import TensorFiles


class PackedWeights:
    """Quantized weights by module name, one read at a time over the mapped files."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.files, self.manifest = TensorFiles(folder, CheckpointError), manifest

    def owner(self, name: str) -> str:
        """Return the module that stores the weight which ``name`` reads."""
        return self.manifest[name].tied_to or name

    def __getitem__(self, name: str) -> QuantizedTensor:
        entry, owner = self.manifest[name], self.owner(name)
        packed, scale = self.files.get(f"{owner}.weight_packed"), self.files.get(f"{owner}.weight_scale")
        second = self.files.get(f"{owner}.weight_global_scale") if entry.blocks and entry.blocks.two_level else None
        return QuantizedTensor(packed, scale, entry.format, entry.blocks or PerRow(), entry.shape, second)
