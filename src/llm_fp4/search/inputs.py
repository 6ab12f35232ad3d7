"""Scale and format of an input by the error of all its operands' outputs, scored on a sample of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llm_fp4 import ranks
from llm_fp4.kernels.simulate import fake_quantize_input
from llm_fp4.numerics import FloatFormat, scale_of_max
from llm_fp4.plan import InputSpec
from llm_fp4.recipe import ModuleRule
from llm_fp4.search.grids import Grid, Loss, search_formats
from llm_fp4.search.ranking import as_operand, rank_product
from llm_fp4.search.shift import channel_shift, shift_limits

_TOKENS = 2048  # rows at once


class OutputError:
    """The weighted squared output error of a token sample as the input's rounding varies.

    With ``E = X - Q`` and ``D = W - W_hat`` the output error is ``E W_hat' + X D'``, of which the second part is the same for every
    rounding: one product for each. Where the outputs outnumber the inputs it is scored by (in, in) forms, so a vocabulary-sized
    operand costs no more than a square one. ``centered``: without the mean of the error, which a bias makes up for.
    """

    def __init__(
        self,
        rows: Tensor,
        row_weight: Tensor,
        weights: list[Tensor],
        counts: Sequence[Tensor | None] = (),
        *,
        centered: bool = False,
    ) -> None:
        """Args: rows (s, in), row_weight (s,), weights (out, in) of every operand; they stay as they are until :meth:`under`.

        ``counts``: (out,) how much the outputs of each operand count; none: all alike.
        """
        self._centered = centered
        self._roots = [c.sqrt().unsqueeze(1) for c in counts if c is not None]
        weights = self._counted(weights)
        self._rows, self._row_weight, self._weights = rows, row_weight, weights
        self._quadratic = sum(map(len, weights)) > 2 * rows.shape[1]
        self._w = self._square(weights, weights) if self._quadratic else _side_by_side(weights)
        # what rounded weights bring to the error: of the rows, by the first of each part, and of their mean
        self._constant: dict[int, tuple[Tensor, ...]] = {}
        self._constant_of_mean: tuple[Tensor, ...] = ()

    def _counted(self, weights: list[Tensor]) -> list[Tensor]:
        return [w * root for w, root in zip(weights, self._roots, strict=True)] if self._roots else weights

    def under(self, rounded: list[Tensor]) -> OutputError:
        """Return the error where the operands are stored as ``rounded``."""
        rounded = self._counted(rounded)
        d = [w - r for w, r in zip(self._weights, rounded, strict=True)]
        other = copy(self)
        forms: tuple[Tensor, ...]
        if self._quadratic:
            other._w, forms = self._square(rounded, rounded), (self._square(d, rounded), self._square(d, d))
        else:
            other._w, forms = _side_by_side(rounded), (_side_by_side(d),)
        other._constant = {i.start: _of_weights(self._rows[i], *forms) for i in ranks.own(len(self._rows), _TOKENS)}
        if self._centered:
            other._constant_of_mean = _of_weights(self._mean(self._rows), *forms)
        return other

    def _square(self, left: list[Tensor], right: list[Tensor]) -> Tensor:
        """Return the (in, in) sum of A'B over the operands, for ranking."""
        n = self._rows.shape[1]
        out = self._rows.new_zeros(n, n)
        for i in ranks.own(n, n):
            for a, b in zip(left, right, strict=True):
                out[i].addmm_(a[:, i].t(), b)
        return as_operand(ranks.united(out))

    def __call__(self, quantize: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the () float64 error with the rows rounded by ``quantize``, a map of (n, in) rows."""
        lost = self._rows.new_zeros(len(self._rows))
        for i in ranks.own(len(self._rows), _TOKENS):
            lost[i] = self._squared(self._rows[i] - quantize(self._rows[i]), self._constant.get(i.start, ()))
        total = torch.dot(ranks.united(lost).double(), self._row_weight.double())
        return total - self._of_means(quantize) if self._centered else total

    def _of_means(self, quantize: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the () float64 part of the error that its mean over tokens makes."""
        e = self._mean(self._rows - quantize(self._rows))
        return self._squared(e, self._constant_of_mean).double().sum() * self._row_weight.sum()

    def _mean(self, rows: Tensor) -> Tensor:
        """Return the (1, in) weighted mean of (s, in) ``rows``."""
        return (self._row_weight / self._row_weight.sum()).unsqueeze(0) @ rows

    def _squared(self, e: Tensor, constant: tuple[Tensor, ...]) -> Tensor:
        """Return the (n,) squared output errors of rows whose rounding errors are (n, in) ``e``."""
        out = rank_product(e, self._w)
        if constant:
            out.add_(constant[0], alpha=2.0 if self._quadratic else 1.0)
        if not self._quadratic:
            return out.square_().sum(1)
        lost = out.mul_(e).sum(1)
        return lost.add_(constant[1]) if constant else lost


def _of_weights(rows: Tensor, crossed: Tensor, own: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return what rounded weights bring to the error of (n, in) ``rows``, whatever becomes of these.

    Args:
        crossed: (in, out) D', or (in, in) D'W_hat of a quadratic form, whose (in, in) D'D is ``own``.
    """
    first = rank_product(rows, crossed)
    return (first,) if own is None else (first, rank_product(rows, own).mul_(rows).sum(1))


def _side_by_side(weights: list[Tensor]) -> Tensor:
    """Return the (in, out) transpose of all operands, for ranking."""
    return torch.cat([as_operand(w).t() for w in weights], 1).contiguous()


@dataclass
class InputChoice:
    """A spec with its scale and shift, and the sample error they give."""

    spec: InputSpec
    scale: Tensor
    shift: Tensor | None
    loss: float

    def quantize(self, rows: Tensor) -> Tensor:
        """Return (n, in) rows rounded by this choice."""
        return fake_quantize_input(rows, self.spec, self.scale, self.shift, None)

    @property
    def unit(self) -> Tensor | None:
        """The () step all rounded values are int8 multiples of, or None where there is no such."""
        return self.scale * 2.0**-self.spec.max_shift if self.spec.granularity == "per_tensor" and self.spec.limbs == 1 else None


def maximum_choice(channel_absmax: Tensor, fmt: FloatFormat, *, per_token: bool, max_shift: int) -> InputChoice:
    """Return the choice in which the largest magnitude is the largest value, with channel shifts up to ``max_shift``."""
    k = channel_shift(channel_absmax, fmt, max_shift) if max_shift else None
    reached = int(k.max()) if k is not None else 0
    spec = InputSpec(fmt, "per_token" if per_token else "per_tensor", reached)
    scale = torch.ones((), device=channel_absmax.device) if per_token else scale_of_max(channel_absmax.amax(), fmt)
    return InputChoice(spec, scale, k if reached else None, float("inf"))


def maximum_choices(channel_absmax: Tensor, rule: ModuleRule, *, per_token: bool) -> list[InputChoice]:
    """Return a choice for every candidate format and shift range of an input, no two of the same spec."""
    found: dict[InputSpec, InputChoice] = {}
    for fmt in rule.input_formats:
        for limit in shift_limits(fmt, rule.shift_range if rule.shift else 0):
            choice = maximum_choice(channel_absmax, fmt, per_token=per_token, max_shift=limit)
            found.setdefault(choice.spec, choice)
    return list(found.values())


def choose_input(
    error: OutputError, starts: Sequence[InputChoice], grid: Grid, current: dict[InputSpec, Tensor] | None = None
) -> tuple[InputChoice, dict[InputSpec, Tensor]]:
    """Return the best of ``starts`` with its scale searched, and the scale of every spec still in the race."""
    by_spec = {start.spec: start for start in starts}

    def loss(scale: Tensor, start: InputChoice) -> Tensor:
        return error(lambda rows: fake_quantize_input(rows, start.spec, scale, start.shift, None))

    losses: dict[InputSpec, Loss] = {spec: partial(loss, start=start) for spec, start in by_spec.items()}
    found = search_formats(losses, {spec: start.scale for spec, start in by_spec.items()}, grid, current)
    spec = min(found, key=lambda s: found[s].total)
    best = InputChoice(spec, found[spec].scale, by_spec[spec].shift, found[spec].total)
    return best, {s: b.scale for s, b in found.items()}
