"""The attention products of a block: found while it runs, decided after the linears before them, quantized in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from llm_fp4.calibration import attention_order, collect_product
from llm_fp4.nn import CHILD, AttentionProducts
from llm_fp4.pipeline.sites import Linears
from llm_fp4.plan import ATTENTION_INPUTS
from llm_fp4.recipe import Recipe
from llm_fp4.search import ProductSample, search_product

NO_SEAM = "left in float: this block's attention does not run through transformers' attention interface"


def full_name(block: str, own: str) -> str:
    """Return the name in the model of what is called ``own`` in ``block``; the block itself where that is empty."""
    return f"{block}.{own}" if own else block


def product_sample(items: list[tuple[Tensor, Tensor, Tensor | None]]) -> ProductSample:
    """Return the sample of a product from both inputs of each sequence and what counts of it, or None."""
    return ProductSample([a for a, _, _ in items], [b for _, b, _ in items], [c for _, _, c in items])


class AttentionSites:
    """The attention modules of one block that wait for their decision.

    Args:
        linears: those of the block that are quantized. run: runs the block on the batch of a number.
        gradients: of the loss at the products, where errors count by them.
    """

    def __init__(
        self, block: nn.Module, name: str, recipe: Recipe, linears: Linears, run: Callable[[int], object], batches: int,
        gradients: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.block, self.name, self.recipe, self.run, self.batches = block, name, recipe, run, batches
        self.gradients = gradients or {}
        self.waiting: list[tuple[str, set[str]]] = []
        self.later: list[tuple[nn.Module, AttentionProducts]] = []
        self.wanted = bool(recipe.attention_formats()[0])
        if self.wanted:
            self.waiting = [
                (n, before)
                for n, before in attention_order(block, linears, lambda: run(0))
                if recipe.selects(full_name(self.name, n))
            ]
            self.found = bool(self.waiting)

    def decide(self, linear: str | None, plans: dict[str, Any], at_once: bool) -> None:
        """Decide every attention module that runs before ``linear`` (None: all that are left).

        Args:
            plans: gains their JSON. at_once: quantize them now, so that what follows reads their quantized outputs.
        """
        if not self.wanted:
            return
        decisions = plans.setdefault("attention", {})
        if linear is None and not self.found:
            decisions[self.name] = {"reason": NO_SEAM}
        while self.waiting and (linear is None or linear not in self.waiting[0][1]):
            name, _ = self.waiting.pop(0)
            module = self.block.get_submodule(name)
            products = AttentionProducts()
            if at_once:
                module.add_module(CHILD, products)
            decisions[full_name(self.name, name)] = [self._product(name, module, products, which) for which in (0, 1)]
            if not at_once:
                self.later.append((module, products))

    def _product(self, name: str, module: nn.Module, products: AttentionProducts, which: int) -> dict[str, Any]:
        recipe = self.recipe

        def gradient(batch: int, item: int) -> Tensor | None:
            return self.gradients.get(f"{full_name(self.name, name)}.{which}.{batch}.{item}")

        signed, probabilities = recipe.attention_formats()
        runs = [partial(self.run, i) for i in range(self.batches)]
        pairs = collect_product(module, which, runs, recipe.search.sample_tokens, gradient)
        formats = (probabilities if which else signed, signed)
        plan = search_product(product_sample(pairs), formats, recipe.searched, recipe.attention.granularity == "per_head")
        products.decide(which, plan)
        return plan.to_json((ATTENTION_INPUTS[2 * which], ATTENTION_INPUTS[2 * which + 1]))

    def place(self) -> None:
        """Quantize what was decided but had to wait."""
        for module, products in self.later:
            module.add_module(CHILD, products)
