"""The squared gradients of a loss at what linears and attention products of a whole float model give.

Of a linear's (tokens, out) squared gradients only the means over outputs and over tokens are kept: their product stands for
them. Of an attention product those rows are kept whole that the search looks at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llm_fp4.calibration.collect import Linears, token_rows
from llm_fp4.calibration.products import kept_items, kept_rows
from llm_fp4.nn import listening


@dataclass(frozen=True)
class Part:
    """Some sequences of a batch.

    Attributes:
        loss: runs the model on them and returns the () loss to differentiate.
        mask, decoder_mask: (sequences, tokens) 0 at padding, or None; ``decoder_mask`` holds once a stack of blocks has run.
        batch: their batch's number. start: the first of them. size: sequences of the whole batch.
    """

    loss: Callable[[], Tensor]
    mask: Tensor | None
    decoder_mask: Tensor | None
    batch: int
    start: int
    size: int


def output_gradients(
    model: nn.Module, linears: Linears, stacks: list[list[str]], parts: Iterable[Part], share: int, done: Callable[[int], None]
) -> dict[str, Tensor]:
    """Return "NAME.tokens" (tokens,) and "NAME.outputs" (out,) float32 of every linear that a gradient reaches.

    Attention products that run through our attention interface are under "NAME.WHICH.BATCH.ITEM": (heads, rows, columns) bfloat16
    gradients, not squared, of the rows and sequences that :func:`collect_product` takes.

    Args:
        stacks: names of the linears of each stack of blocks. share: sequences of a batch that products are sampled from.
        done: told how many parts are done.
    """
    recorder = _Recorder(model, stacks, share)
    with no_parameter_gradients(model), torch.enable_grad(), recorder.attached(linears):
        for number, part in enumerate(parts, 1):
            recorder.part = part
            recorder.begin()
            part.loss().backward()
            done(number)
    return recorder.found()


class _Recorder:
    def __init__(self, model: nn.Module, stacks: list[list[str]], share: int) -> None:
        self.share, self.part = share, Part(lambda: torch.zeros(()), None, None, 0, 0, 0)
        self._names = {id(m): n for n, m in model.named_modules()}
        self._stacks = [set(s) for s in stacks if s]
        self._tokens: dict[str, list[Tensor]] = {}
        self._outputs: dict[str, Tensor] = {}
        self._products: dict[str, Tensor] = {}
        self.begin()

    def begin(self) -> None:
        """Forget what ran in the last pass."""
        self._ran: set[str] = set()

    @contextmanager
    def attached(self, linears: Linears) -> Iterator[None]:
        with ExitStack() as stack:
            for name, module in linears.items():

                def hook(_module: nn.Module, _args: object, out: Tensor, name: str = name) -> Tensor:
                    return self._watch(name, out)

                stack.callback(module.register_forward_hook(hook).remove)
            stack.enter_context(listening(self._product))
            yield

    def _watch(self, name: str, out: Tensor) -> Tensor:
        if not out.requires_grad:  # the first linears: no parameter wants a gradient, so the graph begins at their outputs
            out = out.detach().requires_grad_().clone()
        decoding = any(names <= self._ran for names in self._stacks)
        mask = self.part.decoder_mask if decoding else self.part.mask
        self._ran.add(name)

        def note(gradient: Tensor) -> None:
            squares = token_rows(gradient, mask).float().square()
            self._tokens.setdefault(name, []).append(squares.mean(1).cpu())
            total = squares.sum(0, dtype=torch.float64).cpu()
            self._outputs[name] = self._outputs[name] + total if name in self._outputs else total

        _when_known(out, note)
        return out

    def _product(self, module: nn.Module, which: int, out: Tensor) -> None:
        name, part = self._names.get(id(module)), self.part
        if name is None or out.dim() != 4 or not out.requires_grad:
            return
        rows = kept_rows(out)
        for item in kept_items(part.size, self.share):
            if part.start <= item < part.start + len(out):
                place = f"{name}.{which}.{part.batch}.{item}"

                def note(gradient: Tensor, place: str = place, here: int = item - part.start) -> None:
                    self._products[place] = gradient[here][:, rows].to("cpu", torch.bfloat16)

                _when_known(out, note)

    def found(self) -> dict[str, Tensor]:
        tensors = dict(self._products)
        for name, parts in self._tokens.items():
            tokens = torch.cat(parts)
            tensors |= {f"{name}.tokens": tokens, f"{name}.outputs": (self._outputs[name] / max(len(tokens), 1)).float()}
        return tensors


def _when_known(out: Tensor, note: Callable[[Tensor], None]) -> None:
    """Call ``note`` with the gradient at ``out`` once the way back has reached it."""
    out.register_hook(note)


@contextmanager
def no_parameter_gradients(model: nn.Module) -> Iterator[None]:
    """Let no parameter of ``model`` gather a gradient while the block holds."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for p in wanted:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)
