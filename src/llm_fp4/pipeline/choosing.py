"""Which tokens make the prefix: as few as leave no sink in the calibration text.

A token is outlying where its largest magnitude exceeds the median token's many times at some quantized input. The first token of a
sequence is, whichever it is; a prefix of the model's first token takes that from it. Some models have further such tokens, a full stop
or a line break; the most frequent of them go before it, as in PrefixQuant (arXiv:2410.05265). A sink stands in every sequence, so what
is outlying in fewer than half of them is none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llm_fp4.checkpoint import RunStore
from llm_fp4.models import Batch, Structure, WeightSource
from llm_fp4.pipeline.disturbing import FloatRun
from llm_fp4.pipeline.prefix import PrefixRun, refusal
from llm_fp4.pipeline.sampling import few
from llm_fp4.pipeline.sites import selected_linears
from llm_fp4.progress import Progress
from llm_fp4.recipe import Recipe

DECISION = "prefix"  # its name in the run's state
STAGE = "attention-sink prefix"
OUTLYING = 64.0  # times the median, as PrefixQuant has it
TRIAL_TOKENS = 1024  # of calibration text


@dataclass
class Trial:
    """What one prefix leaves.

    Attributes:
        tokens: of the prefix. sequences: of the text. outlying: those of them with a token that is outlying at some input. largest:
            the largest ratio at any.
        often: the most frequent of the outlying tokens, None where there is none.
    """

    tokens: list[int]
    sequences: int
    outlying: int
    largest: float
    often: int | None

    @property
    def sinks(self) -> bool:
        """Whether as much is left as a sink would leave."""
        return 2 * self.outlying >= self.sequences


def prefix_run(
    recipe: Recipe, model: nn.Module, structure: Structure, source: WeightSource, batches: list[Batch], store: RunStore,
    device: torch.device, progress: Progress, done: dict[str, int], load_outer: Callable[[], None],
) -> PrefixRun | None:  # fmt: skip
    """Return what gives each block its prefix, its tokens as the run's state has them or as they are chosen now; None where no token is outlying.

    Args:
        done: finished blocks of each stack. load_outer: makes every parameter outside the blocks real.
    Raises:
        UnsupportedError: a prefix has no place in the model.
    """
    if recipe.inputs.sinks != "prefix":
        return None
    if any(not isinstance(b.get("input_ids"), Tensor) or b["input_ids"].dim() != 2 for b in batches):
        raise refusal(model, "its calibration data are no token ids")

    def run(tokens: list[int]) -> PrefixRun:
        return PrefixRun(model, structure, store, tokens, batches[0], len(batches), done)

    decision = store.kept(DECISION)
    if decision is None:
        load_outer()
        tried = _choose(
            _Trials(recipe, model, structure, source, few(batches, TRIAL_TOKENS), device), _first(model, batches), recipe, progress
        )
        decision = _decision(tried)
        if decision["tokens"]:
            run(decision["tokens"]).begin()
        source.release(model, "")
        store.keep(DECISION, decision)
    return run(decision["tokens"]) if decision["tokens"] else None


def _first(model: nn.Module, batches: list[Batch]) -> int:
    """Return the token that the model's sequences begin with, or that most of the calibration data's do."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    begin = getattr(text, "bos_token_id", None)
    if isinstance(begin, int):
        return begin
    return Counter(int(t) for b in batches for t in b["input_ids"][:, 0]).most_common(1)[0][0]


def _choose(trials: _Trials, first: int, recipe: Recipe, progress: Progress) -> list[Trial]:
    """Return what was tried, from no prefix on: each longer by one than the last, as long as that halves what is left."""
    most = recipe.inputs.prefix_tokens
    progress(STAGE, 0, most)
    tried = trials.run([[], [first]])
    while tried[0].sinks and tried[-1].sinks and tried[-1].often is not None and len(tried[-1].tokens) < most:
        progress(STAGE, len(tried[-1].tokens), most)
        tried += trials.run([[tried[-1].often, *tried[-1].tokens]])
        if _best(tried) is not tried[-1]:
            break
    progress(STAGE, most, most)
    return tried


def _best(tried: list[Trial]) -> Trial:
    """Return the longest prefix worth its tokens: each must halve what a shorter one left."""
    best = tried[0]
    for longer in tried[1:] if best.sinks else ():
        best = longer if 2 * longer.outlying <= best.outlying else best
    return best


def _decision(tried: list[Trial]) -> dict[str, Any]:
    best = _best(tried)
    out: dict[str, Any] = {"tokens": best.tokens, "tried": [asdict(t) for t in tried]}
    if not best.tokens:
        found = f"{tried[0].outlying} of {tried[0].sequences} sequences have a token that exceeds the median {OUTLYING:g} times at an input"
        out["reason"] = f"no prefix: {found}, " + ("and no prefix halves that" if tried[0].sinks else "which is no sink")
    return out


class _Trials:
    """Runs the float model on a few texts behind prefixes."""

    def __init__(
        self, recipe: Recipe, model: nn.Module, structure: Structure, source: WeightSource, texts: list[Batch], device: torch.device
    ) -> None:  # fmt: skip
        self.recipe, self.model, self.structure, self.source = recipe, model, structure, source
        self.texts, self.device = texts, device

    def run(self, prefixes: list[list[int]]) -> list[Trial]:
        """Return what each of ``prefixes`` leaves."""
        batches = [_behind(p, text) for p in prefixes for text in self.texts]
        run = FloatRun(self.model, self.structure, self.source, batches, self.device)
        outlying = [torch.zeros_like(t["input_ids"], dtype=torch.bool) for _ in prefixes for t in self.texts]
        largest = [0.0] * len(prefixes)
        seen: dict[str, list[Tensor]] = {}
        handles: list[Any] = []

        def settle() -> None:
            while handles:
                handles.pop().remove()
            for absmax in seen.values():
                if len(absmax) == len(batches):
                    self._judge(prefixes, absmax, outlying, largest)
            seen.clear()

        def look(name: str | None) -> None:
            settle()
            for n, linear in self._static(name).items() if name is not None else ():
                handles.append(linear.register_forward_pre_hook(_watch(seen.setdefault(n, []))))

        run.first(look)
        texts = len(self.texts)
        return [self._trial(p, outlying[i * texts : (i + 1) * texts], largest[i]) for i, p in enumerate(prefixes)]

    def _static(self, block: str) -> dict[str, nn.Module]:
        """Return the linears of ``block`` whose input is quantized."""
        found = selected_linears(self.model, self.structure.linears[block], self.recipe)
        return {n: m for n, m in found.items() if self.recipe.rule(n).input_formats}

    def _judge(self, prefixes: list[list[int]], absmax: list[Tensor], outlying: list[Tensor], largest: list[float]) -> None:
        """Note which tokens one input makes outlying."""
        texts = len(self.texts)
        for i, prefix in enumerate(prefixes):
            tokens = [a[:, len(prefix) :] for a in absmax[i * texts : (i + 1) * texts]]
            masks = [self._mask(t) for t in self.texts]
            median = float(torch.cat([a[m] for a, m in zip(tokens, masks, strict=True)]).median())
            for j, (a, m) in enumerate(zip(tokens, masks, strict=True)):
                outlying[i * texts + j] |= (a > OUTLYING * median) & m
                largest[i] = max(largest[i], float(a[m].max()) / max(median, 1e-30))

    def _trial(self, prefix: list[int], outlying: list[Tensor], largest: float) -> Trial:
        counted = Counter(int(t) for text, o in zip(self.texts, outlying, strict=True) for t in text["input_ids"][o])
        often = min(counted, key=lambda t: (-counted[t], t)) if counted else None
        return Trial(prefix, sum(len(o) for o in outlying), sum(int(o.any(1).sum()) for o in outlying), largest, often)

    @staticmethod
    def _mask(text: Batch) -> Tensor:
        mask = text.get("attention_mask")
        return mask.bool() if isinstance(mask, Tensor) else torch.ones_like(text["input_ids"], dtype=torch.bool)


def _behind(prefix: list[int], text: Batch) -> Batch:
    """Return the ids and mask of ``text`` with the prefix before every sequence, and what is no tensor; nothing else has a place for it."""
    ids = text["input_ids"]
    first = torch.tensor([prefix], dtype=ids.dtype, device=ids.device).expand(len(ids), -1)
    out = {k: v for k, v in text.items() if not isinstance(v, Tensor)} | {"input_ids": torch.cat((first, ids), 1)}
    if isinstance(mask := text.get("attention_mask"), Tensor):
        out["attention_mask"] = torch.cat((mask.new_ones(first.shape), mask), 1)
    return out


def _watch(seen: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """Return a hook that notes the largest magnitude of each token."""

    def pre(_module: nn.Module, args: tuple[Any, ...]) -> None:
        if args[0].dim() == 3:  # experts read tokens without their sequences
            seen.append(args[0].abs().amax(-1).float())

    return pre
