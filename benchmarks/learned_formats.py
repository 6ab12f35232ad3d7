"""Formats of every weight and input learned by gradient instead of searched: what ablations.py compares with the search.

Every linear rounds to one of its candidate formats, drawn anew at every step with learned probabilities (the straight-through
Gumbel-softmax, arXiv:1611.01144); they and each format's clipping follow the gradient of the divergence from the float model's
answers. The most likely format of each tensor becomes an override of the recipe; scales are searched as always.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llm_fp4.models import placed
from llm_fp4.numerics import FloatFormat, formats_of_width, soft_level

FORMATS = formats_of_width(4)
STEPS, RATE = 48, 0.1
Answers = Callable[[nn.Module, int], Tensor]  # (rows, classes) logits of a batch by number


class Drawn(nn.Module):
    """A rounding whose format is drawn, with one clipping a format; () or (rows, 1) largest magnitudes come with each call."""

    def __init__(self) -> None:
        super().__init__()
        self.likely = nn.Parameter(torch.zeros(len(FORMATS)))
        self.clip = nn.Parameter(torch.full((len(FORMATS),), 2.5))
        self._last: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, top: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not x:
            drawn, rounded = nn.functional.gumbel_softmax(self.likely, hard=True), torch.zeros_like(x)
            for share, clip, fmt in zip(drawn, self.clip, FORMATS, strict=True):
                scale = top * torch.sigmoid(clip) / fmt.max_level
                rounded = rounded + share * soft_level(x / scale, fmt) * scale
            self._last = x, rounded
        return self._last[1]

    def forget(self) -> None:
        self._last = None

    @property
    def format(self) -> FloatFormat:
        """The most likely one."""
        return FORMATS[int(self.likely.argmax())]


class DrawnLinear(nn.Module):
    """A linear both of whose operands are rounded; ``input`` is shared by linears that read one tensor."""

    def __init__(self, source: nn.Linear, site: Drawn, top: Tensor) -> None:
        super().__init__()
        self.source, self.site, self.top, self.own = (source,), site, top, Drawn()

    @property
    def weight(self) -> Tensor:
        return self.source[0].weight

    def forward(self, x: Tensor) -> Tensor:
        (linear,) = self.source
        weight = linear.weight.detach()
        rounded = self.own(weight, weight.abs().amax(1, keepdim=True))
        return nn.functional.linear(self.site(x, self.top), rounded, linear.bias)


def learned_formats(model: nn.Module, names: Sequence[str], answers: Answers, batches: int) -> list[dict[str, Any]]:
    """Return one override of a recipe for every linear of ``names``: its weight's format and its input's.

    Args:
        answers: runs a model on one of ``batches`` batches.
    """
    torch.manual_seed(0)
    wanted, readers, tops = _float_run(model, names, answers, batches)
    sites: dict[int, Drawn] = {}
    soft = {n: DrawnLinear(model.get_submodule(n), sites.setdefault(readers[n], Drawn()), tops[n]) for n in names}  # type: ignore[arg-type]
    drawn = [*sites.values(), *(layer.own for layer in soft.values())]
    optimizer = torch.optim.Adam([p for d in drawn for p in d.parameters()], lr=RATE)
    with placed(model, soft), torch.enable_grad():
        for step in range(STEPS):
            log = answers(model, step % batches).log_softmax(-1)
            nn.functional.kl_div(log, wanted[step % batches], log_target=True, reduction="batchmean").backward()
            optimizer.step()
            optimizer.zero_grad()
            for one in drawn:
                one.forget()
    return [
        {"targets": [n], "weight_formats": [layer.own.format.name], "input_formats": [layer.site.format.name]}
        for n, layer in soft.items()
    ]


@torch.no_grad()
def _float_run(
    model: nn.Module, names: Sequence[str], answers: Answers, batches: int
) -> tuple[list[Tensor], dict[str, int], dict[str, Tensor]]:
    """Return the float answers, which input each linear reads (in the first batch, by number), and its largest magnitude."""
    seen: list[Tensor] = []
    readers: dict[str, int] = {}
    tops: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        (x,) = arguments
        if name not in readers:
            known = next((i for i, other in enumerate(seen) if other is x), len(seen))
            seen.extend([x] if known == len(seen) else [])
            readers[name] = known
        tops[name] = torch.maximum(tops.get(name, x.abs().amax()), x.abs().amax())

    hooks = [model.get_submodule(n).register_forward_pre_hook(partial(note, n)) for n in names]
    wanted = [answers(model, i).log_softmax(-1) for i in range(batches)]
    for hook in hooks:
        hook.remove()
    return wanted, readers, tops
