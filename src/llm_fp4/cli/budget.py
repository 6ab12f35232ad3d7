"""Average widths and the reasons of a budget's choices, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llm_fp4.cli.render import print_table

if TYPE_CHECKING:
    from llm_fp4.api import AverageBits


def average(bits: AverageBits) -> str:
    """Return the mean widths in one line."""
    stored = "" if bits.stored is None else f" ({bits.stored:.4g} with scales)"
    weights = "float" if bits.weights is None else f"{bits.weights:.4g}{stored}"
    return f"weights {weights}, inputs {'float' if bits.inputs is None else f'{bits.inputs:.4g}'}"


def print_budget(budget: dict[str, Any] | None) -> None:
    """Print what a budget predicts and which parts it kept high."""
    if budget is None:
        return
    predicted, narrowest = budget["takes"]["kl"], budget["narrowest"]["kl"]
    print(f"predicted divergence {predicted:.3g} nats, {narrowest:.3g} with every part at its narrowest")
    rows = [(kept["name"], kept["kind"], kept["why"]) for kept in budget["kept_high"]]
    if rows:
        print_table(("kept high", "", "why"), rows)
