"""Checkpoints that llm-fp4 wrote, read leniently: what does not fit is noted, not refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from llm_fp4.checkpoint import Manifest, ModuleEntry, read_config, read_manifest
from llm_fp4.doctor.findings import Problem
from llm_fp4.doctor.stored import Layers, StoredWeight, pairs
from llm_fp4.errors import CheckpointError, LlmFp4Error
from llm_fp4.numerics import SMALLEST_STEP, levels, scale_values, unpack
from llm_fp4.plan import InputSpec
from llm_fp4.recipe import load_recipe
from llm_fp4.storage import TensorFiles

SMALLEST = {"float16": 2.0**-14, "e4m3": 2.0**-6, "e8m0": 0.0}  # of the normal numbers


class Ours:
    """A directory of ``quant_method: llm_fp4``."""

    def __init__(self, folder: Path) -> None:
        config = read_config(folder)["quantization_config"]
        self.manifest: Manifest = read_manifest(config, str(folder))
        self.kind = f"llm-fp4 {config.get('recipe', '')} {config.get('bits', '')}".rstrip()
        self.files = TensorFiles(folder, CheckpointError)
        self.problems: list[Problem] = []
        self.unread: list[str] = []
        self._fit = {n: e for n, e in self.manifest.items() if self._fits(n, e)}
        names = (n for n in self.files.names() if n.endswith(".weight") and len(self.files.shapes[n]) == 2)
        self.layers = Layers({n.removesuffix(".weight"): self.files.shapes[n] for n in names})

    def _fits(self, name: str, entry: ModuleEntry) -> bool:
        before = len(self.problems)
        for suffix, shape in entry.tensors().items():
            full = f"{name}.{suffix}"
            if full not in self.files.where:
                self.problems.append(Problem("missing tensor", name, f"{suffix} is not in the files"))
            elif self.files.shapes[full] != shape:
                seen = f"{suffix} is {self.files.shapes[full]}, the manifest makes it {shape}"
                self.problems.append(Problem("shape", name, seen))
            elif self.files.dtype(full) != entry.dtype(suffix):
                self.problems.append(Problem("shape", name, f"{suffix} is {self.files.dtype(full)}, not {entry.dtype(suffix)}"))
        return len(self.problems) == before

    def weights(self) -> Iterator[StoredWeight]:
        for name, entry in self._fit.items():
            if entry.input is not None:
                self._check_input(name, entry.input)
            if entry.tied_to is None:
                yield self._weight(name, entry)

    def _check_input(self, name: str, spec: InputSpec) -> None:
        if not 0 < (scale := float(self.files.get(f"{name}.input_scale"))) < float("inf"):
            self.problems.append(Problem("input scale", name, f"the input's scale is {scale}"))
        if spec.max_shift and (top := int(self.files.get(f"{name}.input_shift").max())) > spec.max_shift:
            self.problems.append(Problem("shape", name, f"input_shift reaches {top}, the manifest allows {spec.max_shift}"))

    def _weight(self, name: str, entry: ModuleEntry) -> StoredWeight:
        packed, stored = self.files.get(f"{name}.weight_packed"), self.files.get(f"{name}.weight_scale")
        fmt, columns, blocks = entry.format, entry.shape[1], entry.blocks
        two_level = blocks is not None and blocks.two_level
        unit = 1.0 if blocks is None else fmt.standard_step

        def codes(rows: slice) -> Tensor:
            return unpack(packed[rows], fmt.bits, columns)

        grid = levels(fmt).float() * unit
        if fmt.signed:
            grid[2 ** (fmt.bits - 1)] = -0.0
        return StoredWeight(
            name, fmt.name.upper() + (f" ({blocks.name})" if blocks else ""), entry.shape, codes, grid,
            scale_values(stored).reshape(entry.shape[0], -1), blocks.block_size if blocks else columns,
            SMALLEST[blocks.scale_dtype] if blocks else SMALLEST_STEP,
            float(self.files.get(f"{name}.weight_global_scale")) if two_level else 1.0, two_level,
            orders={"the codes of each byte exchanged": pairs()} if fmt.bits == 4 and columns % 2 == 0 else {},
        )  # fmt: skip

    def transformed(self) -> set[str]:
        """Return the layers whose weights are not the float model's: smoothed or transformed with their inputs, or rotated."""
        try:
            recipe = self.files.folder / "recipe.yaml"
            rotated = recipe.is_file() and load_recipe(str(recipe)).transforms.rotation != "none"
        except LlmFp4Error:  # of a newer version, say
            rotated = False
        if rotated:
            return set(self.manifest)
        return {n for n, e in self.manifest.items() if e.input is not None and (e.input.smooth or e.input.transform)}
