"""The check that a stored tensor is there, as the manifest describes it."""

from __future__ import annotations

import torch

from llm_fp4.errors import CheckpointError
from llm_fp4.storage import TensorFiles


def require_tensor(files: TensorFiles, full: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise CheckpointError where the tensor ``full`` is missing, or of another shape or type; only headers are read."""
    if full not in files.where:
        raise CheckpointError(f"{files.folder} lacks the tensor {full}; the checkpoint is incomplete, quantize again")
    file = files.where[full].name
    if files.shapes[full] != shape:
        raise CheckpointError(f"{full} is {files.shapes[full]} in {file}, the manifest makes it {shape}; the checkpoint is damaged")
    if files.dtype(full) != dtype:
        raise CheckpointError(f"{full} is {files.dtype(full)} in {file}, not {dtype}; the checkpoint is damaged")
