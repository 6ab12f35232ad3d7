"""Quantized attention products: the two matrix products inside a model's own attention, intercepted, not rewritten.

A model's attention function (softmax, masks, biases, caps: whatever it does) runs as it is under a mode that sees its matrix
products. The first is query · key', the second probability · value; each gets its inputs rounded before it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llm_fp4.nn.kept import KeepsDtypes
from llm_fp4.numerics import FloatFormat, fake_quantize, soft_level
from llm_fp4.plan import ATTENTION_INPUTS, AttentionSpec, ProductPlan

CHILD = "attention_products"  # the name of the module that holds the scales, inside the attention module
_PRODUCTS = (torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.bmm, torch.Tensor.__matmul__)

Watcher = Callable[[nn.Module, int, Tensor, Tensor, "Tensor | None"], None]
"""Told of every product: the attention module, 0 or 1, both inputs as multiplied, and the additive mask."""
Listener = Callable[[nn.Module, int, Tensor], None]
"""Told of every product's result: the attention module, 0 or 1, the result."""
_watchers: list[Watcher] = []
_listeners: list[Listener] = []


class AttentionProducts(KeepsDtypes):
    """The scales and formats of an attention's products; lives inside the attention module.

    Until :meth:`decide` was called for a product its inputs stay float.
    """

    kept = tuple(f"{n}_scale" for n in ATTENTION_INPUTS)
    query_scale: Tensor
    key_scale: Tensor
    probability_scale: Tensor
    value_scale: Tensor

    def __init__(self, spec: AttentionSpec | None = None, device: Any = None) -> None:
        super().__init__()
        self._plans: dict[int, ProductPlan] = {}
        self.spec = spec
        for name in ATTENTION_INPUTS if spec is not None else ():
            self.register_buffer(f"{name}_scale", torch.ones(spec.scale_shape if spec else (), dtype=torch.float32, device=device))

    def decide(self, which: int, plan: ProductPlan) -> None:
        """Quantize the inputs of one product from now on."""
        self._plans[which] = plan
        for name, scale in zip(ATTENTION_INPUTS[2 * which : 2 * which + 2], plan.scales, strict=True):
            self.register_buffer(f"{name}_scale", scale.clone())
        if len(self._plans) == 2:
            heads = plan.scales[0].shape[0] if plan.scales[0].dim() else 0
            self.spec = AttentionSpec((*self._plans[0].formats, *self._plans[1].formats), heads)

    def rounded(self, which: int, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Return both inputs of a product, (batch, heads, rows, columns) each, rounded."""
        if self.spec is not None:
            formats = self.spec.formats[2 * which : 2 * which + 2]
        elif which in self._plans:
            formats = self._plans[which].formats
        else:
            return first, second
        scales = (getattr(self, f"{n}_scale") for n in ATTENTION_INPUTS[2 * which : 2 * which + 2])
        a, b = (_fake_quantize(x, s, f).to(x.dtype) for x, s, f in zip((first, second), scales, formats, strict=True))
        return a, b

    def extra_repr(self) -> str:
        spec = self.spec
        return "" if spec is None else ", ".join(f"{n}={f}" for n, f in zip(ATTENTION_INPUTS, spec.formats, strict=True))


def _fake_quantize(x: Tensor, scale: Tensor, fmt: FloatFormat) -> Tensor:
    """Return ``x`` rounded; where gradients are wanted, with that of clipping."""
    wanted = torch.is_grad_enabled() and x.requires_grad
    return soft_level(x.float() * (1.0 / scale), fmt) * scale if wanted else fake_quantize(x, scale, fmt)


class _Intercept(TorchFunctionMode):
    def __init__(self, module: nn.Module, mask: Tensor | None) -> None:
        super().__init__()
        self.module, self.mask, self.seen = module, mask, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _PRODUCTS or self.seen > 1:
            return func(*args, **(kwargs or {}))
        which, self.seen = self.seen, self.seen + 1
        first, second = args[0], args[1]
        for watcher in _watchers:
            watcher(self.module, which, first, second, self.mask)
        products = self.module._modules.get(CHILD)
        if products is not None:
            first, second = cast(AttentionProducts, products).rounded(which, first, second)
        result = func(first, second, *args[2:], **(kwargs or {}))
        for listener in _listeners:
            listener(self.module, which, result)
        return result


def attend(attention: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Return what ``attention``, the model's own function, gives for ``module`` with the products of ``module`` quantized.

    Args:
        args: query, key, value and mask, each as the model passes it.
    """
    if not _watchers and not _listeners and CHILD not in module._modules:
        return attention(module, *args, **kwargs)
    mask = args[3] if len(args) > 3 else kwargs.get("attention_mask")
    with _Intercept(module, mask):
        return attention(module, *args, **kwargs)


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Tell ``watcher`` of every attention product while the block holds."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell ``listener`` of the result of every attention product while the block holds."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
