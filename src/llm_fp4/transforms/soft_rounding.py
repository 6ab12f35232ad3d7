"""Quantized linears whose rounding, row scales and input scale can still be learned, with gradients through the rounding."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from llm_fp4.kernels import kronecker, token_scale
from llm_fp4.kernels.hadamard import hadamard_reference
from llm_fp4.kernels.ops import input_multiplier
from llm_fp4.kernels.simulate import fake_quantize_input
from llm_fp4.numerics import PerRow, levels, round_to_level, soft_level
from llm_fp4.plan import InputPlan, WeightPlan

_EDGE, _MIDDLE = 0.02, 0.45  # how near a value starts to its level, in the distance to the other one, and how far from it


class SoftSite(nn.Module):
    """An input as its plan rounds it; ``log_scale`` () is the logarithm of what its scale is multiplied by (not for block scales).

    Args:
        plan: None leaves the input as it is.
    """

    def __init__(self, plan: InputPlan | None, device: torch.device) -> None:
        super().__init__()
        self.plan = plan
        self.log_scale = nn.Parameter(torch.zeros((), device=device))
        self._read: Tensor | None = None
        self._rounded: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., in) ``x`` mapped and rounded, less its offset; siblings that read the same tensor share the result."""
        if self.plan is None:
            return x
        if self._read is not x or self._rounded is None:
            self._read, self._rounded = x, self._round(x.float(), self.plan)
        return self._rounded

    def _round(self, x: Tensor, plan: InputPlan) -> Tensor:
        spec, scale, shift = plan.spec, plan.scale, plan.shift
        if plan.left is not None and plan.right is not None:
            x = kronecker(x, plan.left, plan.right)
        elif spec.transform is not None:
            x = hadamard_reference(x)  # which has a gradient
        x = x if plan.offset is None else x - plan.offset
        rows = x.reshape(-1, x.shape[-1])
        if spec.blocks is not None:  # scaled anew in every row: nothing to learn
            rounded = rows + (fake_quantize_input(rows.detach(), spec, scale, None, None) - rows.detach())
            return rounded.view(x.shape)
        per_token = spec.granularity == "per_token"
        step = token_scale(rows.detach(), scale, shift, plan.smooth, spec.format.max_level) if per_token else scale
        stretch = torch.exp(self.log_scale)
        level = soft_level(rows * input_multiplier(step, shift, plan.smooth) / stretch, spec.format)
        return (level * (step if shift is None else step * torch.exp2(-shift.float())) * stretch).view(x.shape)

    def forget(self) -> None:
        """Drop the last rounded input: the parameters have changed."""
        self._read = self._rounded = None

    def learned(self) -> InputPlan | None:
        """Return the plan with the scale as it is now."""
        if self.plan is None or self.plan.spec.blocks is not None:
            return self.plan
        # what was clipped was counted under the old scale
        return replace(self.plan, scale=self.plan.scale * torch.exp(self.log_scale.detach()), clipped=None)


class SoftRoundedLinear(nn.Module):
    """``y = x̂ W' + b`` whose weight lies between two levels of its grid, nearer to one of them the colder it is.

    A value is ``lower + sigmoid(logit / temperature) (upper - lower)``; at temperature 0 it is one of the two. They are the level
    that was chosen and its neighbour towards the float weight. Source: AdaRound, arXiv:2004.10568, §3.3; cooling in place of
    its regularizer.

    Args:
        weight: (out, in) float32, transformed and smoothed as it was quantized. rounded: what was chosen for it, on the grid.
        site: of its input, shared with other readers.
    """

    def __init__(self, weight: Tensor, rounded: Tensor, plan: WeightPlan, bias: Tensor | None, site: SoftSite) -> None:
        super().__init__()
        self.plan, self.temperature = plan, 0.0
        self._step = plan.step(weight.shape[1]).to(weight.device)
        grid = levels(plan.format).float().unique().to(weight.device)
        wanted, level = weight / self._step, round_to_level(rounded / self._step, plan.format)
        at, above = torch.searchsorted(grid, level), wanted >= level
        self._lower = torch.where(above, level, grid[(at - 1).clamp_min(0)])
        self._gap = torch.where(above, grid[(at + 1).clamp_max(len(grid) - 1)], level) - self._lower
        share = (wanted - self._lower) / self._gap.clamp_min(1.0)
        # on the side of the chosen level, where compensation chose another than the nearest too
        share = torch.where(above, share.clamp(_EDGE, _MIDDLE), share.clamp(1 - _MIDDLE, 1 - _EDGE))
        self.logit = nn.Parameter(torch.logit(share))
        self.log_scale = nn.Parameter(torch.zeros(len(weight), 1, device=weight.device))
        self._bias, self._site = bias, (site,)  # in a tuple: the site's parameters are its own, not this layer's

    @property
    def weight(self) -> Tensor:
        """(out, in) float32, for model code that asks for a layer's type."""
        return self.logit

    @property
    def scales_learn(self) -> bool:
        """Whether row scales are free; block scales are stored in few bits and stay."""
        return isinstance(self.plan.granularity, PerRow)

    def forward(self, x: Tensor) -> Tensor:
        (site,) = self._site
        step = self._step * torch.exp(self.log_scale) if self.scales_learn else self._step
        out: Tensor = nn.functional.linear(site(x), self._level() * step, self._bias)
        return out.to(x.dtype)

    def _level(self) -> Tensor:
        upper = torch.sigmoid(self.logit / self.temperature) if self.temperature else (self.logit > 0).float()
        return self._lower + self._gap * upper

    @torch.no_grad()
    def learned(self) -> tuple[Tensor, Tensor]:
        """Return the (out, in) values on the grid and its scale, as they are now."""
        scale = self.plan.scale
        if self.scales_learn:
            scale = scale.to(self.logit.device) * torch.exp(self.log_scale).flatten()
        upper = self._lower + self._gap * (self.logit > 0)
        return upper * replace(self.plan, scale=scale).step(upper.shape[1]).to(upper.device), scale
