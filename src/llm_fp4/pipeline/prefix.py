"""The prefix of a run: the keys and values of its tokens, made block by block while the blocks still are float.

The float model's hidden states of the prefix travel through the run beside the calibration data. A short probe behind them shows in
every block that attention is all by which later tokens know of earlier ones, and that of positions only distances count: read as one
sequence that begins at 0, or after the prefix at negative positions, it must come out alike.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from llm_fp4 import ranks
from llm_fp4.checkpoint import RunStore
from llm_fp4.errors import UnsupportedError
from llm_fp4.models import Batch, BlockRunner, Structure
from llm_fp4.nn import AttentionPrefix, hearing_keys, place_prefix

_PROBE = 16  # tokens behind the prefix
_TOLERANCE = 2e-3  # of the largest value; float32 rounding stays below 1e-4
# the prefix alone; with the probe behind it, as one sequence; the probe alone, behind placed keys
_ALONE, _WHOLE, _AFTER = range(3)


class PrefixRun:
    """Gives one attention after another its prefix.

    Args:
        tokens: of the prefix. batch: of the calibration data, whose first tokens are the probe.
        number: under which the store keeps the outputs of the float blocks. done: finished blocks of each stack, counted by the caller.
    """

    def __init__(
        self, model: nn.Module, structure: Structure, store: RunStore, tokens: Sequence[int], batch: Batch, number: int, done: dict[str, int]
    ) -> None:  # fmt: skip
        self.model, self.store, self.number = model, store, number
        probe = batch["input_ids"][:1, : _probe_length(model, len(tokens))]
        prefix = torch.tensor([list(tokens)], dtype=probe.dtype, device=probe.device)
        self.ids, self.length = torch.cat((prefix, probe), 1), len(tokens)
        self.rest = {k: v for k, v in batch.items() if not isinstance(v, Tensor)}
        self.runner = BlockRunner(model, structure.stacks, [self._batch(i) for i in (_ALONE, _WHOLE, _AFTER)], self._output)
        self.runner.done = done
        self.first = structure.blocks[0]
        self._hidden: Tensor | None = None

    def _part(self, which: int, tokens: Tensor) -> Tensor:
        """Return of (1, prefix and probe, ...) what batch ``which`` holds."""
        return tokens[:, : self.length] if which == _ALONE else tokens[:, self.length :] if which == _AFTER else tokens

    def _batch(self, which: int, first: int | None = None) -> Batch:
        first = (0 if which == _WHOLE else -self.length) if first is None else first
        positions = torch.arange(first, first + self.ids.shape[1], device=self.ids.device)[None]
        return {**self.rest, "input_ids": self._part(which, self.ids), "position_ids": self._part(which, positions)}

    def _output(self, block: str, which: int) -> Any:
        whole = self.store.outputs.load(block, self.number)
        return tree_map_only(
            Tensor, lambda x: self._part(which, x) if x.dim() > 1 and x.shape[1] == self.ids.shape[1] else x, whole
        )

    # --- before the first block ---------------------------------------------------------------------

    def begin(self) -> None:
        """Store what the first block reads; everything outside the blocks is float still.

        Raises:
            UnsupportedError: the model adds positions before its blocks, or takes none.
        """
        here, later = (self._embedded(first) for first in (0, 1))
        if here.shape != later.shape or not torch.equal(here, later):
            raise refusal(self.model, "it adds positions to its embeddings, and the prefix stands before the first of them")
        self._hidden = here
        self.store.keep_prefix(here)

    def _embedded(self, first: int) -> Tensor:
        """Return what the first block reads of prefix and probe, the prefix at positions from ``first`` on."""
        runner = BlockRunner(self.model, self.runner.stacks, [self._batch(_WHOLE, first)], self._output)
        args, kwargs = runner.arguments(self.first, 0)
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        return hidden

    # --- block by block -----------------------------------------------------------------------------

    def place(self, name: str) -> dict[str, Any]:
        """Give the attention of the float block ``name`` its prefix; return the JSON of each attention module by full name.

        Raises:
            UnsupportedError: the block knows of earlier tokens otherwise than by attention that runs through transformers' interface.
        """
        heard: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        with hearing_keys(lambda module, key, value: heard.__setitem__(module, (key, value))):
            alone = self._run(name, _ALONE)
        whole = self._run(name, _WHOLE)
        if not heard:
            raise refusal(self.model, f"the attention of {name} does not run through transformers' attention interface")
        names = {m: n for n, m in self.model.get_submodule(name).named_modules(prefix=name)}
        made = {}
        for module, (key, value) in heard.items():
            if key.shape[2] != self.length:
                raise refusal(self.model, f"{names[module]} reads {key.shape[2]} keys where the sequence has {self.length}")
            prefix = AttentionPrefix.of(key[0], value[0])
            place_prefix(module, prefix)
            made[names[module]] = prefix.spec.to_json()
        after = self._run(name, _AFTER)
        expected = _hidden(whole)
        if not bool(_hidden(alone).isfinite().all()):
            raise refusal(self.model, f"{name} has no positions before the first")
        if not _alike(_hidden(alone), expected[:, : self.length]):
            raise refusal(self.model, f"{name} sees later tokens, or counts positions otherwise than by distance")
        if not _alike(_hidden(after), expected[:, self.length :]):
            raise refusal(self.model, f"{name} knows of earlier tokens otherwise than by attention over distances")
        ranks.first(lambda: self.store.outputs.save(name, self.number, whole))
        return made

    @torch.no_grad()
    def _run(self, name: str, which: int) -> Any:
        """Return the output of the loaded block ``name`` for a batch."""
        try:
            args, kwargs = self.runner.arguments(name, which)
        except (IndexError, RuntimeError) as error:
            raise refusal(self.model, f"it has no positions before the first ({str(error).splitlines()[0]})") from None
        if name == self.first:  # embeddings may be quantized by now
            hidden = self._part(which, self.store.prefix() if self._hidden is None else self._hidden).to(self.ids.device)
            args, kwargs = ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})
        return self.model.get_submodule(name)(*args, **kwargs)


def check_prefix(model: nn.Module, structure: Structure) -> None:
    """Raise UnsupportedError where a prefix has no place in ``model``, as far as its make shows."""
    if len(structure.stacks) != 1:
        raise refusal(model, f"it has {len(structure.stacks)} stacks of blocks")
    if not getattr(model, "can_generate", lambda: True)():
        raise refusal(model, "it does not generate text")
    if not getattr(model, "_can_set_attn_implementation", lambda: False)():
        raise refusal(model, "its attention does not run through transformers' attention interface")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise refusal(model, "its forward takes no position_ids")
    if changing := {getattr(m, "rope_type", "default") for m in model.modules()} & {"dynamic", "longrope"}:
        raise refusal(model, f"its {changing.pop()} rotary positions change with the length")


def refusal(model: nn.Module, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"a prefix stands before the tokens of decoders with rotary positions, and {type(model).__name__} differs: {why}; "
        "set inputs.sinks to per_token"
    )


def _probe_length(model: nn.Module, prefix: int) -> int:
    """Return how many tokens can follow ``prefix`` and still see it: a window forgets it, what is placed is always seen."""
    window = getattr(getattr(model, "config", None), "sliding_window", None)
    return min(_PROBE, max(1, window - prefix)) if isinstance(window, int) else _PROBE


def _hidden(out: Any) -> Tensor:
    hidden: Tensor = out[0] if isinstance(out, tuple) else out
    return hidden


def _alike(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and float((found - expected).abs().max()) <= _TOLERANCE * float(expected.abs().max())
