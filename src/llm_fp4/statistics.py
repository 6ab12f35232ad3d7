"""What calibration gathers of an input site and search reads: token rows, maxima, Gram matrices, a sample.

The rows of a site lie in a file that is mapped, not read: memory does not grow with the number of
calibration tokens. Everything derived streams over it in fixed chunks, so that partial sums over parts of
the tokens can be merged in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
    """

    name: str
    tokens: TokenStore
    device: torch.device
    seed: int = 0
    importance: Importance | None = None

    def chunks(self) -> Iterator[Tensor]:
        """Yield (n, in) rows on the device, in order."""
        for rows in self.tokens.rows.split(CHUNK):  # type: ignore[no-untyped-call]
            yield rows.to(self.device)

    def check(self) -> None:
        """Raise NonFiniteError naming the site if a calibration value is NaN or infinite."""
        for rows in self.chunks():
            require_finite(rows, f"the calibration input of {self.name}")

    @cached_property
    def channel_absmax(self) -> Tensor:
        """(in,) largest magnitude of each channel."""
        return torch.stack([rows.abs().amax(0) for rows in self.chunks()]).amax(0)

    def token_absmax(self) -> Tensor:
        """(tokens,) largest magnitude of each token."""
        return torch.cat([rows.abs().amax(1) for rows in self.chunks()])

    @cached_property
    def gram(self) -> Tensor:
        """(in, in) X'X of the unquantized input, tokens weighed by their importance."""
        return self._sums(None).qq

    def quantized_gram(self, quantize: Callable[[Tensor], Tensor] | None, unit: Tensor | None = None) -> Gram:
        """Return the Gram matrices under ``quantize``, a map of (n, in) rows; None leaves the input as it is.

        Args:
            unit: () float32 where every rounded value is a multiple of it by at most 127: Q'Q is then an exact integer product,
                which int8 units form several times faster.
        """
        return Gram(self.gram, None, None) if quantize is None else self._sums(quantize, unit)

    def _sums(self, quantize: Callable[[Tensor], Tensor] | None, unit: Tensor | None = None) -> Gram:
        n = self.tokens.channels
        qq = torch.zeros(n, n, device=self.device)
        eq, ee = (None, None) if quantize is None else (torch.zeros_like(qq), torch.zeros_like(qq))
        roots = None if self.importance is None else self.importance.tokens.sqrt().to(self.device).unsqueeze(1)
        weights = None if roots is None else torch.split(roots, CHUNK)
        for number, rows in enumerate(self.chunks()):
            q = rows if quantize is None else quantize(rows)
            e = None if eq is None else rows - q
            if weights is not None:
                q = q * weights[number]
                e = None if e is None else e.mul_(weights[number])
            if unit is None or weights is not None or q.device.type != "cpu" or min(q.shape) < _INT8_SIDE:
                qq.addmm_(q.t(), q)
            else:
                levels = (q * (1.0 / unit)).round_().to(torch.int8)
                qq.add_(torch._int_mm(levels.t(), levels).float().mul_(unit).mul_(unit))
            if e is not None and eq is not None and ee is not None:
                eq.addmm_(e.t(), q)
                ee.addmm_(e.t(), e)
        return Gram(qq, eq, ee)

    def outputs(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the (out,) importance of the outputs of each of ``weights``, ones where all are alike."""
        if self.importance is None:
            return {n: torch.ones(len(w), device=w.device) for n, w in weights.items()}
        return {n: self.importance.outputs[n].to(w.device) for n, w in weights.items()}

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """Return (s, in) rows and their (s,) weights such that weighted sums estimate sums over all tokens.

        The eighth of the sample with the largest norms (times their importance) is taken whole (few tokens carry most of the energy), the
        rest is drawn uniformly with a fixed seed.
        """
        rows = self.tokens.rows
        total = len(rows)
        counts = torch.ones(total) if self.importance is None else self.importance.tokens.cpu()
        if total <= count:
            return rows.to(self.device), counts.to(self.device)
        energy = torch.cat([r.square().sum(1).cpu() for r in self.chunks()]).mul_(counts)
        order = energy.argsort(descending=True, stable=True)
        heavy, light = order[: count // 8], order[count // 8 :].sort().values
        generator = torch.Generator().manual_seed(self.seed)
        drawn = light[torch.randperm(len(light), generator=generator)[: count - len(heavy)]]
        index = torch.cat((heavy, drawn)).sort().values
        weight = torch.full((total,), len(light) / len(drawn))
        weight[heavy] = 1.0
        return rows[index].to(self.device), (weight * counts)[index].to(self.device)
