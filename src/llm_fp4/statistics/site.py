"""What calibration gathers of an input site and search reads: token rows, maxima, Gram matrices, a sample.

Everything derived streams over the token rows in fixed chunks; of several ranks each sums a part of the
matrices over all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import repeat

import torch
from torch import Tensor

from llm_fp4 import ranks
from llm_fp4.numerics import int8_product, require_finite
from llm_fp4.statistics.gram import Gram, add_upper, mirror, unite_upper
from llm_fp4.statistics.tokens import CHUNK, FloatRows, TokenStore

_INT8_SIDE = 32  # integer products want no narrower matrices


@dataclass(frozen=True)
class Importance:
    """How much the squared output errors of a site count: a factor for each token times one for each output.

    Attributes:
        tokens: (tokens,) float32, their mean 1. outputs: (out,) of each operand, by name.
    """

    tokens: Tensor
    outputs: dict[str, Tensor]


@dataclass
class SiteStatistics:
    """Calibration of one input site.

    Attributes:
        name: the site, for messages.
        tokens: the input the quantized layer will see (propagated, or the float model's own).
        device: where sums are computed.
        seed: of the token sample.
        importance: how much each token and output counts in every sum of squared errors; None: all alike.
        offset: (in,) float32 that is subtracted from every row, or None.
        centered: whether output errors count without their mean, which a bias makes up for.
        base: the statistics of the same rows without offset.
        wanted: where output errors count from what the float layer makes of these rows; None: from what it makes of ``tokens``.
    """

    name: str
    tokens: TokenStore
    device: torch.device
    seed: int = 0
    importance: Importance | None = None
    offset: Tensor | None = None
    centered: bool = False
    base: SiteStatistics | None = None
    wanted: FloatRows | None = None

    def minus(self, offset: Tensor | None) -> SiteStatistics:
        """Return the statistics of the rows less ``offset`` (in,)."""
        return self if offset is None else replace(self, offset=offset, base=self)

    def chunks(self) -> Iterator[Tensor]:
        """Yield (n, in) rows on the device, in order."""
        for rows in self.tokens.chunks():
            yield self._shifted(rows.to(self.device))

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (n, in) rows on the device, in order, and the rows that the float layer is to see in their place."""
        if self.wanted is None:
            yield from ((rows, rows) for rows in self.chunks())
            return
        for rows, wanted in zip(self.chunks(), self.wanted.chunks(), strict=True):
            yield rows, rows.lerp(self._shifted(wanted.to(self.device)), self.wanted.share)

    def _shifted(self, rows: Tensor) -> Tensor:
        return rows if self.offset is None else rows - self.offset

    def roots(self) -> Iterator[Tensor | None]:
        """Yield (n, 1) square roots of the importance of the tokens of every chunk, None where all are alike."""
        if self.importance is None:
            yield from repeat(None, -(-self.tokens.tokens // CHUNK))
        else:
            yield from torch.split(self.importance.tokens.sqrt().to(self.device).unsqueeze(1), CHUNK)

    def outputs(self, name: str) -> Tensor | None:
        """Return the (out,) importance of the outputs of an operand, None where all are alike."""
        return None if self.importance is None else self.importance.outputs[name].to(self.device)

    def check(self) -> None:
        """Raise NonFiniteError naming the site if a calibration value is NaN or infinite."""
        for rows in self.chunks():
            require_finite(rows, f"the calibration input of {self.name}")

    @cached_property
    def channel_absmax(self) -> Tensor:
        """(in,) largest magnitude of each channel."""
        return torch.stack([rows.abs().amax(0) for rows in self.chunks()]).amax(0)

    @cached_property
    def channel_ranges(self) -> tuple[Tensor, Tensor, Tensor]:
        """(in,) smallest value, largest value and mean of each channel."""
        parts = [(rows.amin(0), rows.amax(0), rows.double().sum(0)) for rows in self.chunks()]
        low, high, total = (torch.stack(p) for p in zip(*parts, strict=True))
        return low.amin(0), high.amax(0), (total.sum(0) / self.tokens.tokens).float()

    def means(self, quantize: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, Tensor]:
        """Return the (in,) float64 means of the rows that the float layer is to see and of what ``quantize`` makes of those that
        arrive; None leaves these as they are."""
        n = self.tokens.channels
        exact, rounded = (torch.zeros(n, dtype=torch.float64, device=self.device) for _ in range(2))
        for rows, wanted in self.pairs():
            exact += wanted.double().sum(0)
            rounded += rows.double().sum(0) if quantize is None else quantize(rows).double().sum(0)
        return exact / self.tokens.tokens, rounded / self.tokens.tokens

    def token_absmax(self) -> Tensor:
        """(tokens,) largest magnitude of each token."""
        return torch.cat([rows.abs().amax(1) for rows in self.chunks()])

    @cached_property
    def gram(self) -> Tensor:
        """(in, in) X'X of the unquantized input, as it is without offset, tokens weighed by their importance."""
        return self._sums(None).qq if self.base is None else self.base.gram

    def quantized_gram(self, quantize: Callable[[Tensor], Tensor] | None, unit: Tensor | None = None) -> Gram:
        """Return the Gram matrices under ``quantize``, a map of (n, in) rows; None leaves the input as it is.

        Args:
            unit: () float32 where every rounded value is a multiple of it by at most 127: Q'Q is then an exact integer product,
                which int8 units form several times faster.
        """
        if quantize is None and self.offset is None and not self.centered and self.wanted is None:
            return Gram(self.gram, None, None)
        return self._sums(quantize, unit, center=self.centered)

    def _sums(self, quantize: Callable[[Tensor], Tensor] | None, unit: Tensor | None = None, center: bool = False) -> Gram:
        n = self.tokens.channels
        own = ranks.own(n, n)
        qq = torch.zeros(n, n, device=self.device)
        exact = quantize is None and self.wanted is None
        eq, ee = (None, None) if exact else (torch.zeros_like(qq), torch.zeros_like(qq))
        middle = self._middle(quantize) if center else None
        for (rows, wanted), root in zip(self.pairs(), self.roots(), strict=True):
            q = rows if quantize is None else quantize(rows)
            levels: Tensor | None = None
            as_rounded = root is None and middle is None
            if unit is not None and as_rounded and q.device.type == "cpu" and min(q.shape) >= _INT8_SIDE:
                levels = (q * (1.0 / unit)).round_().to(torch.int8)
            e = None if exact else wanted - q
            if middle is not None:  # before the products: the difference of large sums would lose the small ones
                q, e = q - middle[0], None if e is None else e.sub_(middle[1])
            if root is not None:
                q, e = q * root, None if e is None else e.mul_(root)
            for i in own:
                if levels is None or unit is None:
                    add_upper(qq, q, i)
                else:
                    qq[i, i.start :] += int8_product(levels[:, i].t(), levels[:, i.start :].t()).float().mul_(unit).mul_(unit)
                if eq is not None and ee is not None and e is not None:
                    eq[i].addmm_(e[:, i].t(), q)
                    add_upper(ee, e, i)
        for sums in (qq, ee):
            if sums is not None:
                unite_upper(sums)
                mirror(sums)
        return Gram(qq, None if eq is None else ranks.united(eq), ee)

    def _middle(self, quantize: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, Tensor]:
        """Return the (in,) means of the rounded rows and of their errors, tokens weighed by their importance."""
        q_sum, e_sum = (torch.zeros(self.tokens.channels, dtype=torch.float64, device=self.device) for _ in range(2))
        count = 0.0
        for (rows, wanted), root in zip(self.pairs(), self.roots(), strict=True):
            q = rows if quantize is None else quantize(rows)
            weight = q.new_ones(len(q), 1) if root is None else root.square()
            q_sum += (q * weight).sum(0, dtype=torch.float64)
            e_sum += ((wanted - q) * weight).sum(0, dtype=torch.float64)
            count += float(weight.sum())
        return (q_sum / max(count, 1e-30)).float(), (e_sum / max(count, 1e-30)).float()

    def forget(self) -> None:
        """Give back the memory of :attr:`gram`."""
        self.__dict__.pop("gram", None)

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """Return (s, in) rows and their (s,) weights such that weighted sums estimate sums over all tokens.

        The eighth of the sample with the largest norms (times their importance) is taken whole (few tokens carry most of the energy), the
        rest is drawn uniformly with a fixed seed.
        """
        rows = self.tokens.rows
        total = len(rows)
        counts = torch.ones(total) if self.importance is None else self.importance.tokens.cpu()
        if total <= count:
            return self._shifted(rows.to(self.device)), counts.to(self.device)
        energy = torch.cat([r.square().sum(1).cpu() for r in self.chunks()]).mul_(counts)
        order = energy.argsort(descending=True, stable=True)
        heavy, light = order[: count // 8], order[count // 8 :].sort().values
        generator = torch.Generator().manual_seed(self.seed)
        drawn = light[torch.randperm(len(light), generator=generator)[: count - len(heavy)]]
        index = torch.cat((heavy, drawn)).sort().values
        weight = torch.full((total,), len(light) / len(drawn))
        weight[heavy] = 1.0
        return self._shifted(rows[index].to(self.device)), (weight * counts)[index].to(self.device)
