"""The Hessian of a layer's output error in triangular form: how columns make up for each other's errors, and for the input's.

Source: GPTQ, arXiv:2210.17323. Its feedback, from the inverse of the Hessian, is that of the Hessian's own triangular factor
(QuIP, arXiv:2307.13304, Theorem 6), which needs no inverse.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_fp4.statistics import Gram


@dataclass(frozen=True)
class Feedback:
    """What the rounding errors of columns ask of the columns after them.

    Attributes:
        order: (in,) the columns, the most important first.
        pull: (in, in) float32, rows and columns in that order; an error of column i moves column j > i by ``pull[i, j]`` times it.
    """

    order: Tensor
    pull: Tensor


def damped(hessian: Tensor, damping: float) -> Tensor:
    """Return ``hessian`` (in, in) with ``damping`` of its mean diagonal added to the diagonal, and dead channels made live."""
    out = hessian.clone()
    diagonal = out.diagonal()
    mean = diagonal.mean().clamp_min(1e-12)
    diagonal[diagonal == 0] = mean
    diagonal += damping * mean
    return out


class SingularError(ValueError):
    """A Hessian has no triangular factor in floats: it wants more damping."""


class Factor:
    """``hessian`` (in, in) = R R' with R upper triangular, in float64, its columns ordered by their importance.

    Raises:
        SingularError: there is no such R.
    """

    def __init__(self, hessian: Tensor) -> None:
        self._order = hessian.diagonal().argsort(descending=True, stable=True)
        self._last_first = self._order.flip(0)
        # read backwards, R is the lower triangular factor that a library gives; in place, this is the largest matrix of a run
        self._lower: Tensor = hessian[self._last_first[:, None], self._last_first].double()
        _, failed = torch.linalg.cholesky_ex(self._lower, out=(self._lower, hessian.new_zeros((), dtype=torch.int32)))
        if failed:
            raise SingularError

    def target(self, weight: Tensor, gram: Gram) -> Tensor:
        """Return the (out, in) weight that serves the rounded input best, ``W + W E'Q (Q'Q)^-1``; ``weight`` for an exact input.

        Rounding towards it makes up for the input's error too.
        """
        if gram.eq is None:
            return weight
        wanted = (weight @ gram.eq)[:, self._last_first].double().t()
        found = torch.empty_like(weight)
        found[:, self._last_first] = torch.cholesky_solve(wanted, self._lower).t().float()
        return found.add_(weight)

    def feedback(self) -> Feedback:
        """Return the feedback, and give the factor's memory back."""
        pull = self._lower.float()
        del self._lower
        pull = pull.flip(0, 1)
        return Feedback(self._order, pull.div_(pull.diagonal().clone()))
