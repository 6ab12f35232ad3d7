"""What a target can hold of a checkpoint, decided before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llm_fp4.checkpoint import Manifest, ModuleEntry
from llm_fp4.errors import UnsupportedError
from llm_fp4.plan import InputSpec


@dataclass
class Holding:
    """The account of one export.

    Attributes:
        target: the format written. containers: module → the target's type that holds its weight exactly.
        dropped: sentences on what the target cannot hold and the export leaves out.
        notes: sentences on how to run the result.
    """

    target: str
    containers: dict[str, str]
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"target": self.target, "containers": self.containers, "dropped": self.dropped, "notes": self.notes}


def some(names: Iterable[str]) -> str:
    """Return the first of ``names`` and how many more there are.

    >>> some(["a", "b", "c"])
    'a and 2 more'
    """
    first, *rest = names
    return f"{first} and {len(rest)} more" if rest else first


def weight_kind(entry: ModuleEntry) -> str:
    """Return the format of a weight and of its blocks, if it has any, for people."""
    return entry.format.name.upper() + (f" ({entry.blocks.name})" if entry.blocks else "")


def hold_weights(
    manifest: Manifest, target: str, containers: Mapping[str, str | None], remedy: str,
    holds_input: Callable[[ModuleEntry, InputSpec], bool] = lambda entry, spec: False, *, new_biases: bool = False,
) -> Holding:  # fmt: skip
    """Return how ``target`` holds every weight, with the input sides that it does not hold left out.

    Args:
        containers: for every entry the target's type that holds its weight without rounding, or None. remedy: what to do where it is
            None.
        holds_input: whether the target quantizes that input as we do. new_biases: whether the export writes biases other than the
            checkpoint's, and for layers without: an input's offset is then taken out of them again.
    Raises:
        UnsupportedError: weights that the target cannot hold, or that are wrong without their input side (smoothed, transformed).
    """
    if patches := [n for n in manifest if n.rpartition(".")[2] == "patches"]:
        raise UnsupportedError(f"{target} has a convolution in the place of {some(patches)}; quantize again without patches")
    if refused := [n for n, held in containers.items() if held is None]:
        kinds = ", ".join(sorted({weight_kind(manifest[n]) for n in refused}))
        raise UnsupportedError(f"{target} cannot hold the {kinds} weights of {some(refused)} without rounding them again; {remedy}")
    inputs = {n: e.input for n, e in manifest.items() if e.input is not None}
    if smooth := [n for n, spec in inputs.items() if spec.smooth]:
        raise UnsupportedError(
            f"{target} cannot hold the input factors of {some(smooth)}, and without them the weights are wrong; "
            "export a recipe other than smoothquant"
        )
    if mixed := {n: spec.transform for n, spec in inputs.items() if spec.transform}:
        raise UnsupportedError(
            f"{target} cannot hold the {next(iter(mixed.values()))} transform of the inputs of {some(mixed)}, and without it "
            "the weights are wrong; export a recipe without online transforms"
        )
    if shifted := [n for n, spec in inputs.items() if spec.offset and not new_biases]:
        raise UnsupportedError(
            f"{target} cannot hold the input offsets of {some(shifted)}, and without them the biases are wrong; "
            "export a recipe with inputs.offset none and inputs.unsigned false"
        )
    if added := [n for n, e in manifest.items() if e.added_bias and not new_biases]:
        raise UnsupportedError(
            f"{target} has no place for the bias that {some(added)} gained; export a recipe with search.bias_correction false"
        )
    holding = Holding(target, {n: held for n, held in containers.items() if held is not None})
    if left := [spec for n, spec in inputs.items() if not holds_input(manifest[n], spec)]:
        shifts = sum(spec.max_shift > 0 for spec in left)
        also = f", {shifts} of them with channel shifts" if shifts else ""
        holding.dropped.append(f"the input side of {len(left)} layers{also}: they become weight-only, their inputs stay float")
    return holding
