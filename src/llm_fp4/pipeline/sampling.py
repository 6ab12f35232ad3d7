"""Parts of calibration batches: a few tokens, for what runs the model many times, and the mask of padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llm_fp4.models import Batch, BlockRunner

_LENGTH = 256  # tokens of a sequence that are run
_BATCH = 512  # tokens run at once


def few(batches: list[Batch], tokens: int) -> list[Batch]:
    """Return about ``tokens`` tokens of calibration batches, at even distances: whole inputs, but token sequences cut to 256."""
    rows = [(i, r) for i, batch in enumerate(batches) for r in range(_rows(batch))]
    length = min(_ids(batches[0]).shape[1], _LENGTH) if _ids(batches[0]) is not None else _LENGTH
    wanted = min(len(rows), max(1, tokens // length))
    picked = [rows[i * len(rows) // wanted] for i in range(wanted)]
    cut = [_row(batches[i], r) for i, r in picked]
    together = max(1, _BATCH // length) if len({_shape(b) for b in cut}) == 1 else 1
    return [_joined(cut[i : i + together]) for i in range(0, wanted, together)]


def _ids(batch: Batch) -> Any:
    """Return the (sequences, tokens) ids of a batch that holds nothing else but their mask, else None."""
    tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
    plain = set(tensors) <= {"input_ids", "attention_mask", "token_type_ids"}
    ids = tensors.get("input_ids")
    return ids if plain and ids is not None and ids.dim() == 2 else None


def _rows(batch: Batch) -> int:
    sizes = {v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.dim()}
    return sizes.pop() if len(sizes) == 1 else 1


def _row(batch: Batch, row: int) -> Batch:
    rows, cut = _rows(batch), _LENGTH if _ids(batch) is not None else None
    picked = {k: v[row : row + 1] if rows > 1 and isinstance(v, Tensor) and v.dim() else v for k, v in batch.items()}
    return {k: v[:, :cut] if cut and isinstance(v, Tensor) else v for k, v in picked.items()}


def _shape(batch: Batch) -> str:
    return str([(k, v.shape) if isinstance(v, Tensor) else (k, v) for k, v in batch.items()])


def _joined(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    return {k: torch.cat([b[k] for b in batches]) if isinstance(v, Tensor) else v for k, v in batches[0].items()}


def token_mask(batch: Batch, runner: BlockRunner) -> Tensor | None:
    """Return the (sequences, tokens) mask of what runs next, or None: the decoder's once a stack is finished."""
    decoding = any(n == len(runner.stacks[s]) for s, n in runner.done.items()) and "decoder_input_ids" in batch
    mask = batch.get("decoder_attention_mask" if decoding else "attention_mask")
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
