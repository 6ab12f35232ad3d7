"""Scale and format of an input by the error of all its operands' outputs, scored on a sample of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llm_fp4.kernels.simulate import fake_quantize_input
from llm_fp4.numerics import FloatFormat, scale_of_max
from llm_fp4.plan import InputSpec
from llm_fp4.recipe import ModuleRule
from llm_fp4.search.grids import Grid, Loss, search_formats
from llm_fp4.search.ranking import as_operand, rank_product
from llm_fp4.search.shift import channel_shift, shift_limits


class OutputError:
    """The weighted squared output error of a token sample as the input's rounding varies.

    With ``E = X - Q`` and ``D = W - W_hat`` the output error is ``E W' + Q D'``. Where the outputs outnumber the inputs
    it is scored by (in, in) forms, so a vocabulary-sized operand costs no more than a square one. ``centered``: without the
    mean of the error, which a bias makes up for.
    """

    def __init__(self, rows: Tensor, row_weight: Tensor, weight: Tensor, quantized: Tensor, *, centered: bool = False) -> None:
        """Args: rows (s, in), row_weight (s,), weight and quantized (out, in) of all operands stacked."""
        self.rows, self._row_weight, self._centered = rows, row_weight, centered
        self._quadratic = weight.shape[0] > 2 * weight.shape[1]
        d = weight - quantized
        pairs = [weight.t() @ weight, d.t() @ weight, d.t() @ d] if self._quadratic else [weight.t(), d.t()]
        self._forms = [as_operand(p.contiguous()) for p in pairs]

    def __call__(self, quantized_rows: Tensor) -> Tensor:
        """Return the () float64 error of (s, in) rounded rows."""
        e = self.rows - quantized_rows
        total = torch.dot(self._errors(e, quantized_rows), self._row_weight.double())
        if self._centered:
            count = self._row_weight.sum()
            share = (self._row_weight / count).unsqueeze(0)
            total = total - count * self._errors(share @ e, share @ quantized_rows).sum()
        return total

    def _errors(self, e: Tensor, quantized_rows: Tensor) -> Tensor:
        """Return the (n,) float64 squared output errors of single rows."""
        if self._quadratic:
            ww, dw, dd = self._forms
            cross = rank_product(e, ww).add_(rank_product(quantized_rows, dw), alpha=2.0).mul_(e)
            per_token = cross.add_(rank_product(quantized_rows, dd).mul_(quantized_rows)).sum(1)
        else:
            w, d = self._forms
            per_token = rank_product(e, w).add_(rank_product(quantized_rows, d)).square_().sum(1)
        return per_token.double()


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
        return error(fake_quantize_input(error.rows, start.spec, scale, start.shift, None))

    losses: dict[InputSpec, Loss] = {spec: partial(loss, start=start) for spec, start in by_spec.items()}
    found = search_formats(losses, {spec: start.scale for spec, start in by_spec.items()}, grid, current)
    spec = min(found, key=lambda s: found[s].total)
    best = InputChoice(spec, found[spec].scale, by_spec[spec].shift, found[spec].total)
    return best, {s: b.scale for s, b in found.items()}
