"""How much the outputs of a site count, out of the squared gradients of its operands."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llm_fp4.errors import UnsupportedError
from llm_fp4.statistics import Importance

_LEAST = 1e-3  # of the mean: an output that hardly counts still has a best scale


def site_importance(gradients: Mapping[str, Tensor], weights: dict[str, Tensor], rows: int) -> Importance | None:
    """Return the importance of a site's tokens and outputs, None where no gradient reaches any of its operands.

    The (tokens, out) squared gradients of all operands together are taken for the product of their means over outputs and
    over tokens: one weighted Gram matrix then serves every output.

    Args:
        gradients: see :func:`llm_fp4.calibration.output_gradients`. weights: (out, in) of the operands. rows: tokens that were collected.
    Raises:
        UnsupportedError: the float model gave another number of tokens than were collected.
    """
    known = [n for n in weights if f"{n}.tokens" in gradients]
    for n in known:
        if len(gradients[f"{n}.tokens"]) != rows:
            raise UnsupportedError(
                f"{n} read {rows:,} tokens in calibration but {len(gradients[f'{n}.tokens']):,} in the float model, "
                "so objective fisher cannot weigh them; use --objective output"
            )
    total = sum((gradients[f"{n}.tokens"] * len(weights[n]) for n in known), torch.zeros(rows))
    if not known or not float(total.sum()) > 0:
        return None
    mean = torch.cat([gradients[f"{n}.outputs"] for n in known]).mean()
    counts = {n: gradients[f"{n}.outputs"] / mean if n in known else torch.zeros(len(w)) for n, w in weights.items()}
    return Importance(total / total.mean(), {n: c.clamp_min(_LEAST) for n, c in counts.items()})
