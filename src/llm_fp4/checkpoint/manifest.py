"""The manifest: ``quantization_config`` of config.json, which says what every quantized module is.

It holds all that a loader or an engine needs to build the modules; the numbers are in the tensors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llm_fp4.checkpoint.attention import read_attention, read_caches, verify_children
from llm_fp4.checkpoint.prefix import read_prefix
from llm_fp4.checkpoint.presence import require_tensor
from llm_fp4.errors import CheckpointError, LlmFp4Error
from llm_fp4.nn import CACHE, CHILD, PREFIX
from llm_fp4.numerics import FloatFormat, PerBlock, packed_width, parse, parse_granularity
from llm_fp4.plan import InputSpec
from llm_fp4.storage import TensorFiles

METHOD = "llm_fp4"
VERSION = 2  # 2: with a prefix, which a reader of 1 would leave out
_DTYPES = {
    "weight_packed": torch.uint8, "weight_scale": torch.float32, "weight_global_scale": torch.float32, "input_scale": torch.float32, "input_shift": torch.uint8,
    "input_smooth": torch.float32, "input_left": torch.float32, "input_right": torch.float32, "input_offset": torch.float32,
}  # fmt: skip
STORED = frozenset(_DTYPES)  # the tensors of quantized modules, which are stored as they are


@dataclass(frozen=True)
class ModuleEntry:
    """One quantized module.

    Attributes:
        kind: "linear" or "embedding".
        shape: (out, in) of a linear, (rows, columns) of an embedding.
        input: None where the input stays float.
        multiplier: what an embedding's rows are multiplied by (Gemma).
        blocks: the blocks of the weight that share a scale; None: one float32 scale a row.
        tied_to: the embedding whose packed weight this linear reads; it then stores none of its own.
        added_bias: whether the linear has a bias that the float model's has not.
    """

    kind: str
    format: FloatFormat
    shape: tuple[int, int]
    input: InputSpec | None = None
    tied_to: str | None = None
    multiplier: float = 1.0
    blocks: PerBlock | None = None
    added_bias: bool = False

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {"kind": self.kind, "weight": self.format.name, "shape": list(self.shape)}
        out |= {"granularity": self.blocks.name} if self.blocks else {}
        if self.input is not None:
            out["input"] = self.input.to_json()
        out |= {"multiplier": self.multiplier} if self.multiplier != 1.0 else {}
        out |= {"added_bias": True} if self.added_bias else {}
        return out | ({"tied_to": self.tied_to} if self.tied_to else {})

    @classmethod
    def from_json(cls, name: str, data: Any) -> ModuleEntry:
        """Return the entry of module ``name``.

        Raises:
            CheckpointError: a field is missing, unknown or impossible.
        """
        try:
            if unknown := sorted(
                set(data) - {"kind", "weight", "shape", "input", "tied_to", "multiplier", "granularity", "added_bias"}
            ):
                raise CheckpointError(f"unknown fields {unknown}")
            rows, columns = (int(n) for n in data["shape"])
            if data["kind"] not in ("linear", "embedding") or rows < 1 or columns < 1:
                raise CheckpointError(f"kind {data['kind']!r} with shape {data['shape']}")
            spec = InputSpec.from_json(data["input"]) if data.get("input") else None
            if spec is not None and spec.factors and spec.factors[0] * spec.factors[1] != columns:
                raise CheckpointError(
                    f"transform {spec.transform} of {spec.factors[0] * spec.factors[1]} channels, but {columns} columns"
                )
            blocks = parse_granularity(data["granularity"]) if "granularity" in data else None
            if blocks is not None and (
                not isinstance(blocks, PerBlock) or blocks.scale_dtype == "float32" or data["kind"] != "linear"
            ):
                raise CheckpointError(f"granularity {data['granularity']!r} of the weight of a {data['kind']}")
            multiplier = float(data.get("multiplier", 1.0))
            if not isinstance(added := data.get("added_bias", False), bool) or (added and data["kind"] != "linear"):
                raise CheckpointError(f"added_bias {added!r} of a {data['kind']}")
            return cls(data["kind"], parse(data["weight"]), (rows, columns), spec, data.get("tied_to"), multiplier, blocks, added)
        except (KeyError, TypeError, ValueError, AttributeError, LlmFp4Error) as error:
            raise CheckpointError(
                f"the manifest entry of {name} cannot be read ({error}); the checkpoint is damaged or needs a newer llm-fp4"
            ) from None

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors this module stores, bias apart, by suffix."""
        rows, columns = self.shape
        out: dict[str, tuple[int, ...]] = {}
        if self.tied_to is None:
            scale = self.blocks.shape(rows, columns) if self.blocks else (rows,)
            out |= {"weight_packed": (rows, packed_width(columns, self.format.bits)), "weight_scale": scale}
            out |= {"weight_global_scale": ()} if self.blocks and self.blocks.two_level else {}
        if self.input is not None:
            out["input_scale"] = ()
            if self.input.max_shift:
                out["input_shift"] = (columns,)
            if self.input.smooth:
                out["input_smooth"] = (columns,)
            if factors := self.input.factors:
                out |= {"input_left": (factors[0],) * 2, "input_right": (factors[1],) * 2}
            if self.input.offset:
                out["input_offset"] = (columns,)
        out |= {"bias": (rows,)} if self.added_bias else {}
        return out

    def dtype(self, suffix: str) -> torch.dtype:
        """Return the type in which the tensor called ``suffix`` is stored."""
        return self.blocks.torch_dtype if self.blocks and suffix == "weight_scale" else _DTYPES.get(suffix, torch.float32)


Manifest = dict[str, ModuleEntry]


def read_manifest(config: dict[str, Any], where: str) -> Manifest:
    """Return the quantized modules that a ``quantization_config`` describes.

    Raises:
        CheckpointError: another method, a newer version, or a damaged entry.
    """
    method, version = config.get("quant_method"), config.get("version")
    if method != METHOD:
        raise CheckpointError(f"{where} is quantized by {method!r}, not by {METHOD}; open it with the tool that wrote it")
    if not isinstance(version, int) or version > VERSION:
        raise CheckpointError(f"{where} has checkpoint version {version}, this llm-fp4 reads up to {VERSION}; update llm-fp4")
    modules = config.get("modules")
    if not isinstance(modules, dict):
        raise CheckpointError(f"{where} lists no quantized modules; the checkpoint is damaged")
    manifest = {name: ModuleEntry.from_json(name, entry) for name, entry in modules.items()}
    for name, entry in manifest.items():
        if entry.tied_to is None:
            continue
        owner = manifest.get(entry.tied_to)
        if owner is None:
            raise CheckpointError(
                f"{where}: {name} shares the weight of {entry.tied_to}, which is not listed; the checkpoint is damaged"
            )
        if owner.tied_to is not None or (owner.shape, owner.format, owner.blocks) != (entry.shape, entry.format, entry.blocks):
            raise CheckpointError(
                f"{where}: {name} shares the weight of {entry.tied_to}, which is of another shape or format; the checkpoint is damaged"
            )
    return manifest


def site_spec(site: dict[str, Any]) -> InputSpec:
    """Return the spec of an input site from its plan as JSON."""
    known = {"format", "granularity", "max_shift", "smooth", "transform", "offset"}
    return InputSpec.from_json({k: v for k, v in site.items() if k in known})


def manifest_of_plans(plans: list[dict[str, Any]], shapes: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """Return the JSON of all modules in the units' plans, by module name."""
    inputs = {operand: site for plan in plans for site in plan["inputs"].values() for operand in site["operands"]}
    out = {}
    for plan in plans:
        for name, weight in plan["weights"].items():
            site = inputs.get(name)
            spec = site_spec(site) if site is not None else None
            blocks = parse_granularity(weight["granularity"]) if "granularity" in weight else None
            assert blocks is None or isinstance(blocks, PerBlock)
            entry = ModuleEntry(
                weight["kind"],
                parse(weight["format"]),
                shapes[name],
                spec,
                weight.get("tied_to"),
                weight.get("multiplier", 1.0),
                blocks,
                weight.get("added_bias", False),
            )
            out[name] = entry.to_json()
    return out


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a quantized checkpoint.

    Raises:
        CheckpointError: no such directory or file, not JSON, or not quantized.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no config.json; name a directory that llm-fp4 quantize wrote")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); quantize again") from None
    if not isinstance(config, dict) or not isinstance(config.get("quantization_config"), dict):
        raise CheckpointError(
            f"{folder} is not quantized: config.json has no quantization_config; run llm-fp4 quantize on it first"
        )
    return config


def read_plan(folder: Path) -> dict[str, Any]:
    """Return plan.json; nothing runs on it, so a checkpoint without one is still described by its manifest: {} then.

    Raises:
        CheckpointError: it is damaged.
    """
    path = folder / "plan.json"
    if not path.is_file():
        return {}
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); remove it to see what config.json says, or quantize again") from None
    if not isinstance(plan, dict):
        raise CheckpointError(f"{path} does not hold a plan; remove it to see what config.json says, or quantize again")
    return plan


def verify(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint after checking every quantized tensor's presence, type and shape.

    Only headers are read.

    Raises:
        CheckpointError: anything missing, truncated, or of another shape than the manifest says.
    """
    quantization = read_config(folder)["quantization_config"]
    manifest = read_manifest(quantization, str(folder))
    files = TensorFiles(folder, CheckpointError)
    verify_children(read_attention(quantization, str(folder)), files, CHILD)
    verify_children(read_caches(quantization, str(folder)), files, CACHE)
    prefixes = read_prefix(quantization, str(folder))
    verify_children(prefixes, files, PREFIX)
    for name in files.shapes:
        owner, found, _ = name.partition(f".{PREFIX}.")
        if found and owner not in prefixes:
            raise CheckpointError(
                f"{folder} holds {name}, which config.json does not name; the checkpoint is damaged, quantize again"
            )
    for name, entry in manifest.items():
        for suffix, shape in entry.tensors().items():
            require_tensor(files, f"{name}.{suffix}", shape, entry.dtype(suffix))
    return manifest
