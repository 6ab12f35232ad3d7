"""How much of what a model sees lies beyond its static scales, against what calibration saw."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from llm_fp4.kernels import hadamard
from llm_fp4.kernels.simulate import beyond
from llm_fp4.nn import CACHE, CacheCodes, QuantLinear

FAR = 4.0  # times the share that calibration saw; texts differ, so less says nothing
SOME = 1e-3  # of the values; a smaller share hurts no one


@dataclass
class Clipped:
    """One input, or the keys of one cache, with a static scale.

    Attributes:
        name: of the linear or attention module. cache: whether it is a cache. values: how many were seen.
        share: of the values, clipped. calibrated: the share at calibration, None where it is not known.
    """

    name: str
    cache: bool
    values: int
    share: float
    calibrated: float | None

    @property
    def far(self) -> bool:
        """Whether far more is clipped than calibration saw."""
        return self.calibrated is not None and self.share > max(SOME, FAR * self.calibrated)


@contextmanager
def watch_clipping(model: nn.Module, calibrated: dict[str, float]) -> Iterator[list[Clipped]]:
    """Yield a list that holds, once the block is left, what each static scale of ``model`` clipped meanwhile.

    Args:
        calibrated: the share of each input at calibration, by the name of a linear that reads it, and of each cache.
    """
    found: list[Clipped] = []
    counts: dict[str, list[int]] = {}
    caches: dict[str, CacheCodes] = {}
    with ExitStack() as stack:
        sites = set()
        for name, module in model.named_modules():
            if isinstance(codes := module._modules.get(CACHE), CacheCodes):
                caches[name], codes.beyond = codes, [0, 0]
            if isinstance(module, QuantLinear) and module.spec is not None and module.spec.granularity == "per_tensor":
                if module.site is not None and id(module.site) in sites:  # the same tensor, counted already
                    continue
                sites.add(id(module.site))
                counts[name] = [0, 0]
                stack.callback(module.register_forward_pre_hook(_counter(counts[name])).remove)
        try:
            yield found
        finally:
            counts |= {name: codes.beyond or [0, 0] for name, codes in caches.items()}
            for codes in caches.values():
                codes.beyond = None
            for name, (values, wide) in counts.items():
                if values:
                    found.append(Clipped(name, name in caches, values, wide / values, calibrated.get(name)))


def _counter(count: list[int]) -> Any:
    def pre(module: QuantLinear, args: tuple[Tensor, ...]) -> None:
        spec = module.spec
        assert spec is not None
        rows = args[0].reshape(-1, module.in_features)
        rows = rows if spec.transform is None else hadamard(rows)
        count[0] += rows.numel()
        count[1] += int(beyond(rows, spec, module.input_scale, module.input_shift, module.input_smooth).sum())

    return pre


def clipping_sentence(found: list[Clipped], length: int) -> str | None:
    """Return what is wrong with the static scales at a context of ``length`` tokens and what helps, or None where nothing is."""
    far = [c for c in found if c.far]
    if not far:
        return None
    worst = max(far, key=lambda c: c.share / max(c.calibrated or 0.0, 1e-9))
    inputs = [c for c in far if not c.cache]
    remedy = "inputs: {granularity: per_token}" if inputs else "more bits for the cache, or calibrate on longer sequences"
    return (
        f"at {length:,} tokens the static scales of {len(far)} of {len(found)} tensors clip over {FAR:.0f} times what they did in calibration "
        f"(worst: {worst.name}, {worst.share:.2%} against {worst.calibrated or 0.0:.2%}); "
        + (f"quantize with {remedy}, a scale per token, for contexts of this length" if inputs else f"use {remedy}")
    )
