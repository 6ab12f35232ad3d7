"""Calibration text that the float model writes itself: no data set needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llm_fp4.errors import CalibrationError
from llm_fp4.progress import Progress, silent

CACHE_BYTES = 1 << 30  # of keys and values held while one batch is written
STAGE = "write calibration text"


def ordinary_tokens(tokenizer: Any, vocabulary: int) -> Tensor:
    """Return the (n,) int64 token ids below ``vocabulary`` that stand for text: no special, no padding of the vocabulary."""
    special = set(tokenizer.all_special_ids)
    special.update(token for token, added in tokenizer.added_tokens_decoder.items() if added.special)
    return torch.tensor([t for t in range(min(len(tokenizer), vocabulary)) if t not in special], dtype=torch.int64)


def _batch_size(model: Any, length: int) -> int:
    """Return how many sequences are written at once within ``CACHE_BYTES`` of keys and values, from 1 to 32."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    item = next(model.parameters()).element_size()
    per_sequence = 2 * config.num_hidden_layers * heads * width * item * length
    return int(max(1, min(32, CACHE_BYTES // per_sequence)))


class _Steps:
    """What ``generate`` hands each new token to; only counts."""

    def __init__(self, progress: Progress, done: int, total: int) -> None:
        self.progress, self.done, self.total, self.prompt = progress, done, total, True

    def put(self, tokens: Tensor) -> None:
        if self.prompt:  # the first call carries the prompt
            self.prompt = False
            return
        self.done += len(tokens)
        self.progress(STAGE, self.done, self.total)

    def end(self) -> None:
        pass


def write_text(
    model: Any, tokenizer: Any, *, sequences: int, length: int, seed: int, batch: int | None = None, progress: Progress = silent
) -> Tensor:
    """Return (sequences, length) int64 tokens sampled from ``model`` at temperature 1, with a KV cache.

    Each sequence begins with BOS (or EOS, as a document separator) and one random ordinary token; special
    tokens cannot follow, so that every sequence has its full length. The same seed, thread count and batch
    give the same tokens, and the caller's random state stays as it was.

    Args:
        batch: sequences written at once; by default as many as 1 GiB of keys and values holds, 32 at most.
    Raises:
        CalibrationError: the model's output is NaN or infinite, or it is not a model that generates.
    Source: LLM-QAT, arXiv:2305.17888, §2 (data-free: the first token random, the rest generated).
    """
    if not hasattr(model, "generate"):
        raise CalibrationError(f"{type(model).__name__} cannot write its own calibration text; calibrate on a text file instead")
    device = next(model.parameters()).device
    vocabulary = int(model.config.get_text_config().vocab_size)
    ordinary = ordinary_tokens(tokenizer, vocabulary)
    allowed = torch.zeros(vocabulary, dtype=torch.bool)
    allowed[ordinary] = True
    suppressed = (~allowed).nonzero().flatten().tolist()
    separator = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    batch = batch or _batch_size(model, length)
    total = sequences * length
    own, training = model.generation_config, model.training
    written: list[Tensor] = []
    model.generation_config = type(own)()  # the model's own penalties and cut-offs would skew the text
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.inference_mode():
            torch.manual_seed(seed)
            for begin in range(0, sequences, batch):
                rows = min(batch, sequences - begin)
                start = ordinary[torch.randint(len(ordinary), (rows, 1))]
                if separator is not None:
                    start = torch.cat([torch.full((rows, 1), separator), start], dim=1)
                start = start[:, :length]
                if start.shape[1] < length:
                    start = model.generate(
                        start.to(device), attention_mask=torch.ones_like(start).to(device), max_new_tokens=length - start.shape[1],
                        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, suppress_tokens=suppressed or None, eos_token_id=None,
                        pad_token_id=0, use_cache=True, streamer=_Steps(progress, begin * length, total),
                    )  # fmt: skip
                written.append(start.cpu())
                progress(STAGE, (begin + rows) * length, total)
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        what = "the float model's output is NaN or infinite while it writes calibration text"
        raise CalibrationError(f"{what}; load it in float32, or calibrate on a text file") from error
    finally:
        model.generation_config = own
        model.train(training)
    return torch.cat(written).clone()
