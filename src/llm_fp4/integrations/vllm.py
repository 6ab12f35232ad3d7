"""vLLM serves our checkpoints as they are: a plugin (entry point group ``vllm.general_plugins``), written for vLLM 0.32.

A merged layer (q/k/v; gate/up) runs as one product where its operands have one format and one input, and as several
otherwise. Weights are split over tensor-parallel ranks along their packed rows or columns; channel shifts go with the
input dimension, and a scale per token is agreed between the ranks that share a row.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

from llm_fp4.checkpoint import (
    METHOD,
    STORED,
    Manifest,
    ModuleEntry,
    read_attention,
    read_caches,
    read_manifest,
    read_prefix,
    verify,
)
from llm_fp4.errors import CheckpointError, UnsupportedError
from llm_fp4.integrations.vllm_layers import BlockParameter, InputParameter, Part, RowParameter, WeightParameter, counted, missing
from llm_fp4.numerics import decode, packed_width, unpack


@register_quantization_config(METHOD)
class LlmFp4VllmConfig(QuantizationConfig):
    """The manifest of a checkpoint, asked for each layer of the served model."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__()
        self.manifest = manifest

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75  # int8 tensor cores

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LlmFp4VllmConfig:
        if attention := read_attention(config, "config.json"):
            raise UnsupportedError(
                f"vLLM cannot run quantized attention products ({next(iter(attention))}); quantize again without --attention"
            )
        if caches := read_caches(config, "config.json"):
            raise UnsupportedError(f"vLLM has a cache of its own for {next(iter(caches))}; quantize again without --cache-bits")
        if prefix := read_prefix(config, "config.json"):
            raise UnsupportedError(
                f"vLLM has no place for the prefix that {next(iter(prefix))} sees; quantize again with inputs.sinks per_token"
            )
        manifest = read_manifest(config, "config.json")
        if patches := [n for n in manifest if n.rpartition(".")[2] == "patches"]:
            raise UnsupportedError(f"vLLM has a convolution in the place of {patches[0]}; quantize again without patches")
        return cls(manifest)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.manifest = hf_to_vllm_mapper.apply_dict(self.manifest)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Check a checkpoint in a directory before anything is built: every tensor there, of its type and shape."""
        if os.path.isdir(model_name):
            verify(Path(model_name))

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        if isinstance(layer, LinearBase):
            entries = self.entries(prefix)
            return LlmFp4LinearMethod(prefix, entries) if entries else UnquantizedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):
            name = prefix or self.embedding_name()
            entry = self.manifest.get(name)
            return LlmFp4EmbeddingMethod(name, entry) if entry else UnquantizedEmbeddingMethod()
        if "MoE" in type(layer).__name__ and (packed := next((n for n in self.manifest if n.startswith(f"{prefix}.")), None)):
            raise UnsupportedError(
                f"vLLM fuses the experts of {prefix}, whose packed weights ({packed}) it cannot take; leave them in float"
            )
        return None

    def embedding_name(self) -> str:
        """Return the name of the table of tokens, which most models of vLLM build without saying its name.

        Raises:
            UnsupportedError: the checkpoint has several embeddings.
        """
        names = [n for n, e in self.manifest.items() if e.kind == "embedding"]
        if len(names) > 1:
            raise UnsupportedError(f"vLLM does not say which of {', '.join(names)} it builds; leave them in float")
        return names[0] if names else ""

    def entries(self, prefix: str) -> dict[str, ModuleEntry]:
        """Return the manifest's entries of a layer's operands, in order; empty where the layer is float.

        Raises:
            UnsupportedError: only some of the operands that vLLM merges are quantized.
        """
        if prefix in self.manifest:
            return {prefix: self.manifest[prefix]}
        parent, _, last = prefix.rpartition(".")
        names = [f"{parent}.{n}" if parent else n for n in self.packed_modules_mapping.get(last, [])]
        found = {n: self.manifest[n] for n in names if n in self.manifest}
        if found and len(found) < len(names):
            kept = next(n for n in names if n not in found)
            raise UnsupportedError(
                f"vLLM merges {', '.join(names)}, but {kept} is float and {next(iter(found))} is not; quantize or ignore all of them"
            )
        return found


@register_weight_loader_v2_supported_method
class LlmFp4LinearMethod(LinearMethodBase):
    """A linear layer, perhaps of several merged operands, on packed weights."""

    def __init__(self, prefix: str, entries: dict[str, ModuleEntry]) -> None:
        self.prefix, self.entries = prefix, entries
        kinds = {(e.format.bits, e.blocks) for e in entries.values()}
        if len(kinds) > 1:
            raise UnsupportedError(f"vLLM merges {', '.join(entries)}, whose weights differ in width or blocks; give them one")

    def create_weights(
        self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int, output_size: int,
        params_dtype: torch.dtype, **extra: Any,
    ) -> None:  # fmt: skip
        entries = list(self.entries.values())
        if offset := [n for n, e in self.entries.items() if e.added_bias or (e.input is not None and e.input.offset)]:
            raise UnsupportedError(
                f"vLLM cannot serve {offset[0]}, whose input has an offset or which gained a bias; quantize again with inputs.offset "
                "none, inputs.unsigned false and search.bias_correction false"
            )
        bits, rows, columns = entries[0].format.bits, sum(output_partition_sizes), input_size_per_partition
        if columns < input_size and packed_width(columns, bits) * 8 != columns * bits:
            raise UnsupportedError(f"{self.prefix} cannot be split: {columns} weights of {bits} bits do not end on a byte")
        if columns < input_size and any(e.input is not None and e.input.transform for e in entries):
            raise UnsupportedError(
                f"{self.prefix} transforms whole rows of its input, which tensor parallelism splits; serve it on one rank"
            )
        layer.llm_fp4_sizes = output_partition_sizes if len(entries) > 1 else [rows]
        layer.llm_fp4_dtype = params_dtype

        def add(name: str, parameter: type, data: Tensor, **dims: int) -> None:
            loader: Callable[..., None] = extra["weight_loader"]
            made = parameter(data=data, weight_loader=loader, **dims)
            made.weight_loader = counted(loader, made)
            layer.register_parameter(name, made)

        packed = torch.zeros(rows, packed_width(columns, bits), dtype=torch.uint8)
        add("weight_packed", WeightParameter, packed, input_dim=1, output_dim=0)
        parts, blocks = len(entries), entries[0].blocks
        if blocks is None:
            add("weight_scale", RowParameter, torch.zeros(rows), output_dim=0)
        else:
            if columns < input_size and columns % blocks.block_size:
                raise UnsupportedError(f"{self.prefix} cannot be split: {columns} columns are no multiple of {blocks.block_size}")
            stored = torch.zeros(blocks.shape(rows, columns)).to(blocks.torch_dtype)
            add("weight_scale", BlockParameter, stored, input_dim=1, output_dim=0)
            if blocks.two_level:
                add("weight_global_scale", InputParameter, torch.zeros(parts, 1))
        spec = entries[0].input
        if any((e.input is None) != (spec is None) for e in entries):
            raise UnsupportedError(
                f"vLLM merges {', '.join(self.entries)}, of which only some have quantized inputs; treat them alike"
            )
        if spec is None:
            return
        if columns < input_size and spec.transform is not None:
            raise UnsupportedError(
                f"{self.prefix} cannot be split: its input passes a transform of all channels; serve it on one GPU"
            )
        if any(e.input is not None and e.input.factors for e in entries):
            raise UnsupportedError(
                f"{self.prefix} reads its input through a learned transform, which is not implemented in vLLM; "
                "quantize without transforms.learned"
            )
        add("input_scale", InputParameter, torch.zeros(parts, 1))
        if any(e.input is not None and e.input.max_shift for e in entries):
            add("input_shift", InputParameter, torch.zeros(parts, columns, dtype=torch.uint8))
        if any(e.input is not None and e.input.smooth for e in entries):
            add("input_smooth", InputParameter, torch.ones(parts, columns))

    def process_weights_after_loading(self, layer: Any) -> None:
        self.check(layer)
        split = isinstance(layer, RowParallelLinear) and layer.tp_size > 1
        bias = None if layer.skip_bias_add or (split and layer.tp_rank > 0) else layer.bias
        layer.llm_fp4_parts = Part.of(layer, list(self.entries.values()), layer.llm_fp4_sizes, split, bias)

    def check(self, layer: Any) -> None:
        """Raise CheckpointError for a tensor of ``layer`` that the checkpoint did not give."""
        for suffix in STORED:
            if (parameter := getattr(layer, suffix, None)) is not None and missing(parameter, len(self.entries)):
                raise CheckpointError(f"the checkpoint lacks {suffix} of {self.prefix}; it is incomplete, quantize again")

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out = [part(x) for part in layer.llm_fp4_parts]  # with their bias
        return out[0] if len(out) == 1 else torch.cat(out, -1)


class LlmFp4EmbeddingMethod(LlmFp4LinearMethod):
    """A table of tokens, or the output head, which may read the table's weights."""

    def __init__(self, prefix: str, entry: ModuleEntry) -> None:
        super().__init__(prefix, {prefix: entry})
        self.entry = entry

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        fmt, columns = self.entry.format, self.entry.shape[1]
        codes = unpack(layer.weight_packed[ids], fmt.bits, columns)
        rows = decode(codes, fmt) * layer.weight_scale[ids].unsqueeze(-1)
        result: Tensor = rows.to(layer.llm_fp4_dtype)  # a Gemma's factor is multiplied by vLLM's model itself
        return result

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        if self.entry.tied_to is not None:
            layer.weight_packed, layer.weight_scale = embed_tokens.weight_packed, embed_tokens.weight_scale
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        self.check(layer)
        if self.entry.kind == "linear":
            layer.llm_fp4_parts = Part.of(layer, [self.entry], layer.llm_fp4_sizes, False, None)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = super().apply(layer, x)
        return y if bias is None else y + bias


def register() -> None:
    """Make vLLM know ``quant_method: "llm_fp4"``: done by importing this module."""
