"""The loss whose gradients say how much an output counts: of labels, of next tokens, or of what the model itself predicts.

Source: LLM-FP4, arXiv:2310.16836, Eq. 24, which leaves open where labels come from. Labels drawn from the model's own
predictions make the expected squared gradient the Fisher information, the curvature of the divergence from the float model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_leaves

_IGNORED = -100  # a label that does not count, as transformers has it


def loss_of(model: Any, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
    """Return the () loss of ``model`` on a batch, summed over its labels.

    * "labels" in the batch: the model's own loss.
    * A model that writes text: the next token of the batch's own.
    * Other logits: classes drawn from the model's own probabilities.
    * No logits: the first output, each value drawn around the model's own with variance 1.

    Args:
        generator: on the CPU, draws the model's own labels.
    """
    out = model(**batch)
    if "labels" in batch and isinstance(getattr(out, "loss", None), Tensor):
        labels: Tensor = batch["labels"]
        loss: Tensor = out.loss * (len(labels) if labels.is_floating_point() else int((labels != _IGNORED).sum()))
        return loss
    logits = getattr(out, "logits", None)
    ids, mask = _read(batch)
    if logits is None:
        return _around(next(x for x in tree_leaves(out) if isinstance(x, Tensor) and x.is_floating_point()), mask, generator)
    written = getattr(model, "can_generate", lambda: False)() and ids is not None and logits.shape[:-1] == ids.shape
    if written and ids is not None:
        labels = (ids if mask is None else ids.masked_fill(mask == 0, _IGNORED))[:, 1:]
        logits = logits[:, :-1]
    else:
        flat = logits.detach().float().softmax(-1).flatten(0, -2)
        labels = torch.multinomial(flat.cpu(), 1, generator=generator).view(logits.shape[:-1]).to(logits.device)
        if mask is not None and mask.shape == labels.shape:
            labels = labels.masked_fill(mask == 0, _IGNORED)
    return cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=_IGNORED, reduction="sum")


def _read(batch: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """Return the token ids whose logits a batch gives, and their mask."""
    decoding = "decoder_input_ids" in batch
    mask = batch.get("decoder_attention_mask" if decoding else "attention_mask")
    return batch.get("decoder_input_ids" if decoding else "input_ids"), mask


def _around(output: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
    """Return the part of half the squared distance to values drawn around ``output`` that has a gradient there."""
    noise = torch.randn(output.shape, generator=generator).to(output.device)
    if mask is not None and output.shape[:-1] == mask.shape:
        noise = noise * mask.unsqueeze(-1)
    return (output.float() * noise).sum()
