"""Loading a checkpoint through transformers, after checking it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from llm_fp4.api.prepare import checked_device
from llm_fp4.checkpoint import read_config, verify
from llm_fp4.errors import CheckpointError


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
    verify(folder)
    target = checked_device(device)
    architecture = (read_config(folder).get("architectures") or [""])[0]
    if not hasattr(transformers, architecture):
        raise CheckpointError(f"{folder} is a {architecture or 'nameless architecture'}, which transformers {transformers.__version__} lacks; update it")
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
        raise CheckpointError(f"{folder} lacks {missing[0]} and {len(missing) - 1} more tensors; the checkpoint is incomplete, quantize again")
    return model.to(target).eval()
