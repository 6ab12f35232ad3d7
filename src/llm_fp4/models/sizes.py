"""Refusing a config.json whose sizes no stored tensor has, before a model of those sizes is built.

Building costs memory and time by the config alone: a billion layers would be made one by one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from llm_fp4.errors import LlmFp4Error, SourceError

_COUNTS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "encoder_layers",
    "decoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
)
_WIDTHS = (
    "hidden_size", "intermediate_size", "vocab_size", "head_dim", "num_attention_heads", "num_key_value_heads", "d_model", "d_ff",
    "n_embd", "n_inner", "n_head", "num_experts", "num_local_experts", "n_routed_experts", "type_vocab_size",
)  # fmt: skip

SLACK = 4  # a config may state a width that this model does not use


def check_sizes(
    config: Mapping[str, Any], shapes: Collection[tuple[int, ...]], where: Path, error: type[LlmFp4Error] = SourceError
) -> None:
    """Raise ``error`` where ``config`` states more layers than there are tensors, or a width far beyond every tensor's.

    Args:
        config: parsed config.json, searched with its nested configurations. shapes: of all stored tensors.
    """
    widest = max((max(shape, default=1) for shape in shapes), default=0)
    for name, value in _sizes(config):
        limit = len(shapes) if name in _COUNTS else SLACK * max(widest, len(shapes))
        if value < 0 or value > limit:
            what = f"{len(shapes):,} tensors" if name in _COUNTS else f"a largest dimension of {widest:,}"
            raise error(f"{where} states {name} {value:,}, but its tensors have {what}; the config is damaged or of another model")


def _sizes(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in config.items():
        if isinstance(value, Mapping) and name != "quantization_config":
            yield from _sizes(value)
        elif isinstance(value, int) and not isinstance(value, bool) and name in (*_COUNTS, *_WIDTHS):
            yield name, value
