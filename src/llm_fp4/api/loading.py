"""Loading models to run them: a checkpoint through transformers, after checking it, or a float model whole."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm_fp4.api.prepare import checked_device
from llm_fp4.checkpoint import METHOD, Manifest, read_config, verify
from llm_fp4.errors import CheckpointError
from llm_fp4.models import FloatModel, check_sizes, open_model, open_tokenizer
from llm_fp4.nn import AttentionPrefix, CacheCodes, PackedModule, QuantLinear
from llm_fp4.numerics import scale_values
from llm_fp4.progress import Progress, silent
from llm_fp4.storage import TensorFiles

STAGE = "load the model"


@dataclass
class Loaded:
    """A model ready to run.

    Attributes:
        tokenizer: the model's own, or None where it has none. quantized: whether it is one of our checkpoints.
        origin: what the user named.
    """

    model: Any
    tokenizer: Any
    quantized: bool
    origin: str


def load(path: str | Path, *, dtype: torch.dtype | str = "auto", device: str = "cpu") -> Any:
    """Return the quantized model of a checkpoint directory, ready for ``forward`` and ``generate``.

    Raises:
        CheckpointError: missing, incomplete, damaged, newer than this package, or of another model.
    """
    import transformers

    from llm_fp4.integrations.register import register

    register()
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a directory; name one that llm-fp4 quantize wrote")
    manifest = verify(folder)
    _check_config(folder, manifest)
    target = checked_device(device)
    architecture = (read_config(folder).get("architectures") or [""])[0]
    if not hasattr(transformers, architecture):
        raise CheckpointError(
            f"{folder} is a {architecture or 'nameless architecture'}, which transformers {transformers.__version__} lacks; update it"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, info = getattr(transformers, architecture).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except CheckpointError:
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{folder} cannot be loaded: {first}") from None
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{folder} lacks {missing[0]} and {len(missing) - 1} more tensors; the checkpoint is incomplete, quantize again"
        )
    _check_values(model)
    return model.to(target).eval()


def load_any(path: str | Path, *, device: str = "cpu", progress: Progress = silent) -> Loaded:
    """Return the model that ``path`` names, in float32: a checkpoint of ours, or a float model as ``quantize`` takes it.

    Raises:
        CheckpointError, SourceError: it is missing, damaged or of no kind that is understood.
    """
    target = checked_device(device)
    progress(STAGE, 0, 1)
    if is_checkpoint(path):
        loaded = Loaded(load(path, dtype=torch.float32, device=device), open_tokenizer(Path(path)), True, str(path))
    else:
        opened = open_model(str(path))
        loaded = Loaded(whole_model(opened).to(target), opened.tokenizer, False, str(path))
    progress(STAGE, 1, 1)
    return loaded


def whole_model(opened: FloatModel) -> nn.Module:
    """Return the opened float model with every tensor in memory, float32, in evaluation mode."""
    model: Any = opened.source.load(opened.model, "", torch.device("cpu"))
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # a shared tensor was read once for each of its names
    whole: nn.Module = model.eval()
    return whole


def is_checkpoint(path: str | Path) -> bool:
    """Return whether ``path`` is a directory whose config.json says that we quantized it."""
    try:
        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
        return bool(config["quantization_config"]["quant_method"] == METHOD)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_config(folder: Path, manifest: Manifest) -> None:
    """Raise CheckpointError where config.json states sizes that none of the stored tensors has."""
    shapes = list(TensorFiles(folder, CheckpointError).shapes.values()) + [e.shape for e in manifest.values()]
    check_sizes(read_config(folder), shapes, folder / "config.json", CheckpointError)


def _check_values(model: nn.Module) -> None:
    """Raise CheckpointError for scales that are not finite or shifts beyond what the manifest states."""
    for name, module in model.named_modules():
        if isinstance(module, CacheCodes) and not all(bool((b.isfinite() & (b > 0)).all()) for b in module.buffers()):
            raise CheckpointError(f"the scales in {name} are not all positive numbers; the checkpoint is damaged, quantize again")
        if isinstance(module, AttentionPrefix) and not all(bool(b.isfinite().all()) for b in module.buffers()):
            raise CheckpointError(f"the keys and values in {name} are not all numbers; the checkpoint is damaged, quantize again")
        if not isinstance(module, PackedModule):
            continue
        for kept in module.kept:
            scale = getattr(module, kept, None)
            if scale is not None and not bool(torch.isfinite(scale_values(scale)).all()):
                raise CheckpointError(f"{name}.{kept} holds NaN or infinity; the checkpoint is damaged, quantize again")
        if isinstance(module, QuantLinear) and module.spec is not None and module.input_shift is not None:
            largest = int(module.input_shift.max())
            if largest > module.spec.max_shift:
                raise CheckpointError(
                    f"{name}.input_shift reaches {largest}, the manifest allows {module.spec.max_shift}; the checkpoint is damaged"
                )
