"""Rotation of the residual stream and of every head's values, merged into weights as they are read.

A residual stream ``x`` becomes ``x Q``: embeddings ``E Q``, linears that read it behind a norm ``W diag(gain) Q`` with the
gain set to 1, linears that write it ``Q' W``. The values of a head become ``v R``, which the writer behind them undoes.
RMSNorm commutes with rotations once its gain is 1. Source: QuaRot, arXiv:2404.00456, §4.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from llm_fp4.transforms.roles import BlockRoles
from llm_fp4.transforms.rotation import Rotation


class Merge:
    """Knows for every parameter of a model what it becomes.

    Args:
        residual: the rotation of the residual stream. head: of the values of each head, or None.
        embeddings: names of modules whose rows begin the stream. blocks: block name → roles. outer: linear → norm, behind
            the last block.
    """

    def __init__(
        self, residual: Rotation, head: Rotation | None, embeddings: list[str], blocks: dict[str, BlockRoles], outer: dict[str, str]
    ) -> None:
        self.residual, self._head, self._embeddings = residual, head, set(embeddings)
        self._readers, self._writers = dict(outer), set[str]()
        self._values, self._mixed = set[str](), set[str]()
        for block, roles in blocks.items():
            self._readers |= {f"{block}.{n}": f"{block}.{norm}" for n, norm in roles.readers.items()}
            self._writers |= {f"{block}.{n}" for n in roles.writers}
            if head is not None:
                self._values |= {f"{block}.{n}" for n in roles.values}
                self._mixed |= {f"{block}.{n}" for n in roles.values.values()}
        self._norms = set(self._readers.values())
        self._gains: dict[str, Tensor] = {}

    def changes(self, name: str) -> bool:
        """Return whether the module called ``name`` owns a tensor that changes."""
        return name in self._norms | self._embeddings | self._writers or name in self._readers

    def apply(self, modules: dict[str, nn.Module]) -> None:
        """Change the parameters of ``modules``, by full name, each as it was read from the float model.

        A norm and its readers may come at different times, the norm not after them.
        """
        for name in sorted(modules, key=lambda n: n not in self._norms):
            module = modules[name]
            weight = cast(Tensor, module.weight).detach()
            bias = cast(Tensor | None, getattr(module, "bias", None))
            if name in self._norms:
                self._gains[name] = weight.clone()
                weight = weight.new_ones(weight.shape)
            if name in self._embeddings:
                weight = self.residual.right(weight)
            if name in self._readers:
                weight = self.residual.right(weight * self._gains[self._readers[name]])
            if self._head is not None and name in self._values:
                weight = self._head.heads_left(weight)
                bias = None if bias is None else self._head.heads_right(bias.detach())
            if self._head is not None and name in self._mixed:
                weight = self._head.heads_right(weight)
            if name in self._writers:
                weight = self.residual.left(weight)
                bias = None if bias is None else self.residual.right(bias.detach())
            module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
            if bias is not None:
                module._parameters["bias"] = nn.Parameter(bias.detach(), requires_grad=False)
