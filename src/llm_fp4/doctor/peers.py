"""Directories of compressed-tensors (NVFP4, MXFP4, int4, FP8) and of ModelOpt (NVFP4).

NVFP4 of compressed-tensors has ``weight_packed``, ``weight_scale`` and the divisor ``weight_global_scale``; ModelOpt's has
``weight``, ``weight_scale`` and the factor ``weight_scale_2``. The low nibble is the even column in both.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_fp4.doctor.findings import Problem
from llm_fp4.doctor.stored import Layers, StoredWeight, pairs
from llm_fp4.errors import CheckpointError, UnsupportedError
from llm_fp4.numerics import levels, parse, scale_values, unpack
from llm_fp4.storage import TensorFiles

E2M1 = levels(parse("e2m1")).float() / 2  # 0 0.5 1 1.5 2 3 4 6
E2M1[8] = -0.0
_FP8 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
_WORD = {"the codes of each byte exchanged": pairs(8), "each word read from its highest code": torch.arange(8).flip(0)}
_SWAPPED = {"the codes of each byte exchanged": pairs()}


class Peer:
    """A directory of compressed-tensors, or of ModelOpt."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.files = TensorFiles(folder, CheckpointError)
        self.config, self.modelopt = config, config.get("quant_method") == "modelopt"
        self.problems: list[Problem] = []
        self.unread: list[str] = []
        if self.modelopt and "NVFP4" not in str(config.get("quant_algo")):
            raise UnsupportedError(f"{folder} is ModelOpt {config.get('quant_algo')}; only its NVFP4 can be examined")
        found = {n.rpartition(".")[0] for n in self.files.names() if n.endswith((".weight_packed", ".weight_scale"))}
        self.modules = sorted(found, key=_natural)
        self.kind = (
            f"ModelOpt {config['quant_algo']}" if self.modelopt else f"compressed-tensors {config.get('format', '')}".strip()
        )
        names = (n for n in self.files.names() if n.endswith(".weight") and len(self.files.shapes[n]) == 2)
        floats = {n.removesuffix(".weight"): self.files.shapes[n] for n in names if n.removesuffix(".weight") not in found}
        self.layers = Layers(floats, {n for n in floats if self._ignores(n)})
        if not found:
            self.problems.append(Problem("missing tensor", "all layers", "no file has a weight_scale"))

    def _ignores(self, name: str) -> bool:
        patterns = self.config.get("exclude_modules" if self.modelopt else "ignore") or []
        if self.modelopt:
            return any(fnmatch.fnmatch(name, p) or name.startswith(p.removesuffix("*")) for p in patterns)
        # a group may also name its layers one by one; the others are then in float by that
        targets = [t for g in self.config.get("config_groups", {}).values() for t in g.get("targets", [])]
        named = all(t.startswith("re:") or "." in t for t in targets) and not any(_matches(t, name) for t in targets)
        return named or any(_matches(p, name) for p in patterns)

    def weights(self) -> Iterator[StoredWeight]:
        for name in self.modules:
            packed = "weight" if self.modelopt or f"{name}.weight_packed" not in self.files.where else "weight_packed"
            parts = [packed, "weight_scale"]
            if missing := next((p for p in parts if f"{name}.{p}" not in self.files.where), None):
                self.problems.append(Problem("missing tensor", name, f"{missing} is not in the files"))
                continue
            if f"{name}.weight_zero_point" in self.files.where or f"{name}.weight_g_idx" in self.files.where:
                self.unread.append(f"{name} has zero points or an order of groups, which are not examined")
                continue
            read = self._weight(name, self.files.get(f"{name}.{packed}"), self.files.get(f"{name}.weight_scale"))
            if read is not None:
                yield read

    def _weight(self, name: str, packed: Tensor, stored: Tensor) -> StoredWeight | None:
        rows = packed.shape[0]
        second, own = self._global(name, "weight_scale_2" if self.modelopt else "weight_global_scale")
        if packed.dtype == torch.int32:
            shape = self.files.get(f"{name}.weight_shape").tolist() if f"{name}.weight_shape" in self.files.where else None
            columns, kind, grid, block = (shape or [0, packed.shape[1] * 8])[1], "int4", torch.arange(-8.0, 8.0), None
            if self._bits(name) != 4:
                self.unread.append(f"{name} has {self._bits(name)}-bit integers, which are not examined")
                return None
        elif packed.dtype == torch.float8_e4m3fn:
            columns, kind, grid, block = packed.shape[1], "FP8 E4M3", _FP8, None
        elif packed.dtype == torch.uint8 and stored.dtype == torch.uint8:
            columns, kind, grid, block = packed.shape[1] * 2, "MXFP4", E2M1, 32
        elif packed.dtype == torch.uint8:
            columns, kind, grid, block = packed.shape[1] * 2, "NVFP4", E2M1, 16
            if not own:
                self.problems.append(Problem("missing tensor", name, "its global scale is not in the files"))
                return None
        else:
            self.problems.append(Problem("shape", name, f"the weight is {packed.dtype}, which is none of the packed types"))
            return None
        scale = (
            scale_values(stored).reshape(rows, -1)
            if stored.shape[0] == rows and stored.dim()
            else scale_values(stored).reshape(1, -1)
        )
        size = block or -(-columns // scale.shape[1])
        if (
            scale.shape[0] != rows
            or scale.shape[1] != -(-columns // size)
            or (packed.dtype == torch.int32 and packed.shape[1] * 8 < columns)
        ):
            self.problems.append(
                Problem("shape", name, f"{rows} x {columns} values have scales {tuple(stored.shape)}, blocks of {size}")
            )
            return None

        def codes(part: slice) -> Tensor:
            if packed.dtype == torch.float8_e4m3fn:
                return packed[part].view(torch.uint8)
            return unpack(packed[part].contiguous().view(torch.uint8), 4, columns)

        inputs, _ = self._global(name, "input_scale" if self.modelopt else "input_global_scale")
        smallest = {torch.float8_e4m3fn: 2.0**-6, torch.float16: 2.0**-14}.get(stored.dtype, 0.0)
        orders = {} if packed.dtype == torch.float8_e4m3fn else _WORD if packed.dtype == torch.int32 else _SWAPPED
        return StoredWeight(
            name, kind, (rows, columns), codes, grid, scale, size, smallest, second if own else 1.0, own,
            inputs if kind == "NVFP4" else None, orders,
        )  # fmt: skip

    def _global(self, name: str, suffix: str) -> tuple[float, bool]:
        """Return the factor that a global scale stands for, and whether there is one; 1 over 0 is infinite."""
        if f"{name}.{suffix}" not in self.files.where:
            return float("nan"), False
        value = self.files.get(f"{name}.{suffix}").float().flatten()
        if len(value) != 1:
            self.problems.append(Problem("shape", name, f"{suffix} has {len(value)} values, not one"))
        return float(value[0] if self.modelopt else 1.0 / value[0]), True

    def _bits(self, name: str) -> int:
        for group in self.config.get("config_groups", {}).values():
            if any(_matches(t, name) or t == "Linear" for t in group.get("targets", [])):
                return int((group.get("weights") or {}).get("num_bits", 4))
        return 4


def peer_config(folder: Path) -> dict[str, Any] | None:
    """Return the ``quantization_config`` of another tool's directory, ModelOpt's own file included; None where there is none."""
    for file, key in (("config.json", "quantization_config"), ("hf_quant_config.json", "quantization")):
        try:
            found = json.loads((folder / file).read_text(encoding="utf-8")).get(key)
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(found, dict):
            return {"quant_method": "modelopt", **found} if file.startswith("hf_") else found
    return None


def _matches(pattern: str, name: str) -> bool:
    return bool(re.match(pattern[3:], name)) if pattern.startswith("re:") else pattern == name


def _natural(name: str) -> list[Any]:
    return [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)]
