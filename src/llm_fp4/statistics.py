"""What calibration gathers of an input site and search reads: token rows, maxima, Gram matrices, a sample.

The rows of a site lie in a file that is mapped, not read: memory does not grow with the number of
calibration tokens. Everything derived streams over it in fixed chunks, so that partial sums over parts of
the tokens can be merged in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from llm_fp4.numerics import require_finite

CHUNK = 4096  # tokens per step of every streaming sum: 127 * 127 * 4096 fits int32
_INT8_SIDE = 32  # integer products want no narrower matrices


class TokenStore:
    """Rows of (tokens, channels) float32 in a file: appended once, then read through a shared mapping."""

    def __init__(self, path: Path, channels: int) -> None:
        self.path, self.channels, self.tokens = path, channels, 0
        self._file = path.open("wb")

    def append(self, rows: Tensor) -> None:
        """Append (n, channels) rows."""
        self._file.write(rows.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        self.tokens += len(rows)

    @cached_property
    def rows(self) -> Tensor:
        """(tokens, channels) float32 over the file's pages; reading ends the appending."""
        self._file.close()
        flat = torch.from_file(str(self.path), shared=True, size=self.tokens * self.channels, dtype=torch.float32)
        return flat.view(self.tokens, self.channels)

    def delete(self) -> None:
        self._file.close()
        self.__dict__.pop("rows", None)
        self.path.unlink(missing_ok=True)


@dataclass
class Gram:
    """Sums over tokens for the error ``E = target - quantized`` of an input and its quantized form ``Q``.

    With ``D = W - W_hat`` the squared output error is ``W ee W' + 2 D eq' W' + D qq D'`` summed over rows: no
    large terms cancel.

    Attributes:
        qq: (in, in) Q'Q. eq: (in, in) E'Q, None where E is 0. ee: (in, in) E'E, None where E is 0.
    """

    qq: Tensor
    eq: Tensor | None
    ee: Tensor | None


@dataclass
class SiteStatistics:
    """Calibration of one input site.

    Attributes:
        name: the site, for messages.
        tokens: the input the quantized layer will see (propagated, or the float model's own).
        device: where sums are computed.
        seed: of the token sample.
        offset: (in,) float32 that is subtracted from every row, or None.
        centered: whether output errors count without their mean, which a bias makes up for.
        base: the statistics of the same rows without offset.
    """

    name: str
    tokens: TokenStore
    device: torch.device
    seed: int = 0
    offset: Tensor | None = None
    centered: bool = False
    base: SiteStatistics | None = None

    def minus(self, offset: Tensor | None) -> SiteStatistics:
        """Return the statistics of the rows less ``offset`` (in,)."""
        return self if offset is None else replace(self, offset=offset, base=self)

    def chunks(self) -> Iterator[Tensor]:
        """Yield (n, in) rows on the device, in order."""
        for rows in self.tokens.rows.split(CHUNK):  # type: ignore[no-untyped-call]
            yield self._shifted(rows.to(self.device))

    def _shifted(self, rows: Tensor) -> Tensor:
        return rows if self.offset is None else rows - self.offset

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
        """Return the (in,) float64 means of the rows and of what ``quantize`` makes of them; None leaves them as they are."""
        n = self.tokens.channels
        exact, rounded = (torch.zeros(n, dtype=torch.float64, device=self.device) for _ in range(2))
        for rows in self.chunks():
            exact += rows.double().sum(0)
            rounded += rows.double().sum(0) if quantize is None else quantize(rows).double().sum(0)
        return exact / self.tokens.tokens, rounded / self.tokens.tokens

    def token_absmax(self) -> Tensor:
        """(tokens,) largest magnitude of each token."""
        return torch.cat([rows.abs().amax(1) for rows in self.chunks()])

    @cached_property
    def gram(self) -> Tensor:
        """(in, in) X'X of the unquantized input, as it is without offset: what the layer's output is measured by."""
        return self._sums(None).qq if self.base is None else self.base.gram

    def quantized_gram(self, quantize: Callable[[Tensor], Tensor] | None, unit: Tensor | None = None) -> Gram:
        """Return the Gram matrices under ``quantize``, a map of (n, in) rows; None leaves the input as it is.

        Args:
            unit: () float32 where every rounded value is a multiple of it by at most 127: Q'Q is then an exact integer product,
                which int8 units form several times faster.
        """
        if quantize is None:
            return (
                Gram(self.gram, None, None) if self.offset is None and not self.centered else self._sums(None, center=self.centered)
            )
        return self._sums(quantize, unit, center=self.centered)

    def _sums(self, quantize: Callable[[Tensor], Tensor] | None, unit: Tensor | None = None, center: bool = False) -> Gram:
        n = self.tokens.channels
        sum_q, sum_e = (torch.zeros(n, device=self.device) for _ in range(2))
        qq = torch.zeros(n, n, device=self.device)
        eq, ee = (None, None) if quantize is None else (torch.zeros_like(qq), torch.zeros_like(qq))
        for rows in self.chunks():
            q = rows if quantize is None else quantize(rows)
            if unit is None or q.device.type != "cpu" or min(q.shape) < _INT8_SIDE:
                qq.addmm_(q.t(), q)
            else:
                levels = (q * (1.0 / unit)).round_().to(torch.int8)
                qq.add_(torch._int_mm(levels.t(), levels).float().mul_(unit).mul_(unit))
            sum_q += q.sum(0)
            if eq is not None and ee is not None:
                e = rows - q
                eq.addmm_(e.t(), q)
                ee.addmm_(e.t(), e)
                sum_e += e.sum(0)
        if center:  # n times the products of the means
            count = max(self.tokens.tokens, 1)
            qq.addr_(sum_q, sum_q, alpha=-1.0 / count)
            if eq is not None and ee is not None:
                eq.addr_(sum_e, sum_q, alpha=-1.0 / count)
                ee.addr_(sum_e, sum_e, alpha=-1.0 / count)
        return Gram(qq, eq, ee)

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """Return (s, in) rows and their (s,) weights such that weighted sums estimate sums over all tokens.

        The eighth of the sample with the largest norms is taken whole (few tokens carry most of the energy), the
        rest is drawn uniformly with a fixed seed.
        """
        rows = self.tokens.rows
        total = len(rows)
        if total <= count:
            return self._shifted(rows.to(self.device)), torch.ones(total, device=self.device)
        energy = torch.cat([r.square().sum(1).cpu() for r in self.chunks()])
        order = energy.argsort(descending=True, stable=True)
        heavy, light = order[: count // 8], order[count // 8 :].sort().values
        generator = torch.Generator().manual_seed(self.seed)
        drawn = light[torch.randperm(len(light), generator=generator)[: count - len(heavy)]]
        index = torch.cat((heavy, drawn)).sort().values
        weight = torch.full((total,), len(light) / len(drawn))
        weight[heavy] = 1.0
        return self._shifted(rows[index].to(self.device)), weight[index].to(self.device)
