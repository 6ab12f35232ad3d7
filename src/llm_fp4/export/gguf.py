"""GGUF: one file that llama.cpp runs, with its tokenizer.

E1M2 in blocks of 32 with float16 scales becomes Q4_0, MXFP4 and NVFP4 blocks the types of the same name (NVFP4's scale of
the tensor beside it, as ``.scale``). Needs ``gguf``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from llm_fp4.checkpoint import STORED, Manifest, ModuleEntry, read_config
from llm_fp4.errors import UnsupportedError
from llm_fp4.export.gguf_blocks import F32, NVFP4, Q4_0, block_bytes, block_type, half_scales
from llm_fp4.export.gguf_model import add_hyperparameters, add_tokenizer, architecture, plain, rotary_rows
from llm_fp4.export.holding import Holding, hold_weights, some
from llm_fp4.export.weights import PackedWeights
from llm_fp4.storage import output_error

WHOLE_MODEL = False
FILE = "model.gguf"
_REMEDY = (
    "quantize with the recipe nvfp4 or mxfp4, or with weights {formats: [e1m2], granularity: per_block, block_size: 32, "
    "scale_dtype: float16}"
)


def _container(entry: ModuleEntry) -> str | None:
    return F32 if entry.kind == "embedding" or entry.tied_to is not None else block_type(entry)


def hold(manifest: Manifest, weights: PackedWeights) -> Holding:
    """Return what GGUF holds.

    Raises:
        UnsupportedError: an architecture that is not written, or weights and scales that GGUF's blocks would round.
    """
    architecture(read_config(weights.files.folder))
    holding = hold_weights(manifest, "gguf", {n: _container(e) for n, e in manifest.items()}, _REMEDY)
    if rounded := [n for n, held in holding.containers.items() if held == Q4_0 and half_scales(weights[n]) is None]:
        raise UnsupportedError(f"gguf keeps the scales of Q4_0 in float16, which would round those of {some(rounded)}; {_REMEDY}")
    if F32 in holding.containers.values():
        holding.notes.append("embeddings, and heads that share them, are float32 values: no type here has a real scale a row")
    holding.notes.append("llama.cpp rounds the inputs of 4-bit products to 8 bits in blocks of 32 as it runs")
    return holding


def write(folder: Path, weights: PackedWeights, out: Path) -> None:
    """Write ``model.gguf`` into ``out``.

    Raises:
        UnsupportedError: gguf is not installed or too old, or the tokenizer is of a kind that is not written.
        OutputError: the directory cannot be written.
    """
    try:
        import gguf
    except ImportError:
        raise UnsupportedError("exporting to gguf needs gguf; install it: pip install 'llm-fp4[gguf]'") from None
    config = read_config(folder)
    kind = architecture(config)
    if missing := {h for e in weights.manifest.values() if (h := _container(e)) and not hasattr(gguf.GGMLQuantizationType, h)}:
        raise UnsupportedError(f"this gguf does not know the type {missing.pop()}; update it: pip install -U gguf")
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, kind.upper()), config["num_hidden_layers"])
    writer = gguf.GGUFWriter(out / FILE, kind)
    add_hyperparameters(writer, config)
    add_tokenizer(writer, folder, config["vocab_size"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    def add(full: str, tensor: Tensor, dtype: str) -> None:
        raw = None if dtype in ("F32", "F16") else getattr(gguf.GGMLQuantizationType, dtype)
        writer.add_tensor(full, tensor.contiguous().numpy(), raw_dtype=raw)

    for full in weights.files.names():
        name, _, suffix = full.rpartition(".")
        if name in weights.manifest and suffix in STORED and suffix != "weight_packed":
            continue
        mapped = names.get_name(name)
        if mapped is None:
            raise UnsupportedError(f"gguf's {kind} architecture has no place for {full}; use another target")
        if name in weights.manifest and suffix == "weight_packed":
            _add_weight(add, weights, name, mapped, config)
        else:
            tensor, dtype = plain(rotary_rows(weights.files.get(full), name, config))
            add(f"{mapped}.{suffix}", tensor, dtype)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    except OSError as error:
        raise output_error(error, out / FILE) from None


def _add_weight(add: Any, weights: PackedWeights, name: str, mapped: str, config: dict[str, Any]) -> None:
    container, weight = _container(weights.manifest[name]), weights[name]
    if container in (F32, None):
        add(f"{mapped}.weight", weight.dequantize(), "F32")
        return
    add(f"{mapped}.weight", rotary_rows(block_bytes(weight, container), name, config), container)
    if container == NVFP4:
        assert weight.second_scale is not None
        add(f"{mapped}.scale", weight.second_scale.reshape(1), "F32")
