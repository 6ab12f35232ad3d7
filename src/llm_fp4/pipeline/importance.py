"""How much the tokens and outputs of a site count: by the squared gradients of its operands, or so that outlier tokens are not all there is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llm_fp4.errors import UnsupportedError
from llm_fp4.statistics import Importance, TokenStore

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


def balanced_importance(
    store: TokenStore, weights: dict[str, Tensor], ratio: float, known: Importance | None = None
) -> Importance | None:
    """Return the importance under which outlier tokens together count no more than all others; ``known`` where they do not anyway.

    An attention sink, or a token in which a vision model keeps notes, can have thousands of times the energy of the others. The squared
    error of a layer is then its error alone; left out, the token itself would go wrong, which others may read.

    Args:
        store: the rows of a site. weights: (out, in) of the operands. ratio: of a token's squared norm to the median, above which it is
            an outlier. known: what they count by already; None: all alike.
    """
    before = torch.ones(store.tokens) if known is None else known.tokens
    energy = torch.cat([rows.square().sum(1) for rows in store.chunks()]) * before
    outlier = energy > ratio * energy.median()
    theirs, others = float(energy[outlier].sum(dtype=torch.float64)), float(energy[~outlier].sum(dtype=torch.float64))
    if not 0 < others < theirs:
        return known
    tokens = torch.where(outlier, others / theirs, 1.0) * before
    return Importance(
        tokens / tokens.mean(), {n: torch.ones(len(w)) for n, w in weights.items()} if known is None else known.outputs
    )
