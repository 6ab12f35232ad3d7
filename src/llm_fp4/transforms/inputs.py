"""Maps of an input as it arrives, and what they make of the weights that read it: the product stays the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from llm_fp4.kernels import hadamard, kronecker
from llm_fp4.plan import InputPlan


class InputTransform(Protocol):
    """A map T of rows such that ``T(x) @ weight(w).T == x @ w.T``."""

    def rows(self, x: Tensor) -> Tensor:
        """Return (tokens, in) rows as they are quantized."""
        ...

    def weight(self, weight: Tensor) -> Tensor:
        """Return the (out, in) weight that reads them."""
        ...

    def tell(self, plan: InputPlan) -> None:
        """Write the transform into the plan of its input."""
        ...


class HadamardTransform:
    """The Hadamard transform of ``kernels.hadamard``, its own inverse."""

    def rows(self, x: Tensor) -> Tensor:
        mixed: Tensor = hadamard(x)
        return mixed

    def weight(self, weight: Tensor) -> Tensor:
        return self.rows(weight)

    def tell(self, plan: InputPlan) -> None:
        plan.spec = replace(plan.spec, transform="hadamard")


@dataclass
class KroneckerTransform:
    """An input times the Kronecker product of ``left`` (a, a) and ``right`` (b, b), both invertible float32."""

    left: Tensor
    right: Tensor

    def rows(self, x: Tensor) -> Tensor:
        return kronecker(x, self.left, self.right)

    def weight(self, weight: Tensor) -> Tensor:
        # x P (w P^-T)' = x w'
        return kronecker(weight, inverse_transposed(self.left), inverse_transposed(self.right))

    def tell(self, plan: InputPlan) -> None:
        plan.spec = replace(plan.spec, transform=f"kronecker_{len(self.left)}x{len(self.right)}")
        plan.left, plan.right = self.left, self.right


def inverse_transposed(matrix: Tensor) -> Tensor:
    """Return the transposed inverse of a square float32 matrix, computed in float64."""
    found: Tensor = torch.linalg.inv(matrix.double()).t().to(matrix.dtype)
    return found
