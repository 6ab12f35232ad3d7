"""Continuing a prompt, piece by piece as the model writes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llm_fp4.api.loading import Loaded, load_any
from llm_fp4.errors import CalibrationError, UnsupportedError
from llm_fp4.integrations.decoder import Decoder
from llm_fp4.progress import Progress, silent


def generate_text(
    path_or_model: str | Path | Loaded, prompt: str, *, max_new_tokens: int = 128, temperature: float = 0.0, seed: int = 0,
    chat: bool = False, on_text: Callable[[str], None] | None = None, device: str = "cpu", progress: Progress = silent,
) -> str:  # fmt: skip
    """Return what the model writes after ``prompt``, the prompt itself left out.

    Args:
        temperature: 0 takes the likeliest token each time; above, tokens are sampled with ``seed``.
        chat: whether the prompt is a user's message, put into the model's chat template.
        on_text: called with each piece of text as it is finished.
    Raises:
        CheckpointError, SourceError: the model cannot be loaded. CalibrationError: the prompt is empty or there is no tokenizer.
        UnsupportedError: ``chat`` without a chat template, or a model that does not generate.
    """
    loaded = path_or_model if isinstance(path_or_model, Loaded) else load_any(path_or_model, device=device, progress=progress)
    if not hasattr(loaded.model, "generate"):
        raise UnsupportedError(
            f"{loaded.origin} is a {type(loaded.model).__name__}, which does not generate text; use a causal language model"
        )
    inputs = _prompt_tokens(loaded, prompt, chat)
    device_ = next(iter([*loaded.model.parameters(), *loaded.model.buffers()])).device
    streamer = None if on_text is None else _streamer(loaded.tokenizer, on_text)
    decoder = _decoder(loaded, inputs.shape[1] + max_new_tokens)
    with torch.random.fork_rng(devices=[device_] if device_.type == "cuda" else []):
        torch.manual_seed(seed)
        if decoder is not None:
            written = _continue(decoder, inputs[0], max_new_tokens, temperature, streamer)
        else:
            written = _generate(loaded.model, inputs.to(device_), max_new_tokens, temperature, streamer)
    text: str = loaded.tokenizer.decode(written, skip_special_tokens=True)
    return text


def _decoder(loaded: Loaded, capacity: int) -> Decoder | None:
    """Return the model's compiled decoder, or None where transformers must run it."""
    if not loaded.quantized:
        return None
    try:
        return Decoder(loaded.model, capacity)
    except UnsupportedError:
        return None


def _continue(decoder: Decoder, prompt: torch.Tensor, count: int, temperature: float, streamer: Any) -> list[int]:
    """Return up to ``count`` tokens after the (tokens,) ``prompt``, up to the model's end token."""
    ends = decoder.model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    written: list[int] = []
    if streamer is not None:
        streamer.put(prompt[None])
    logits = decoder.prompt(prompt)
    while True:
        token = int(torch.multinomial(torch.softmax(logits / temperature, -1), 1)) if temperature > 0 else int(logits.argmax())
        written.append(token)
        if streamer is not None:
            streamer.put(torch.tensor([token]))
        if len(written) == count or token in ends:
            break
        logits = decoder.step(token)
    if streamer is not None:
        streamer.end()
    return written


def _generate(model: Any, inputs: torch.Tensor, count: int, temperature: float, streamer: Any) -> list[int]:
    """Return what transformers' own loop writes after the (1, tokens) ``inputs``."""
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {"do_sample": False}
    )
    own = model.generation_config
    config = type(own)(  # the model's own sampling defaults would contradict what is asked for here
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id or 0, max_new_tokens=count, **sampling,
    )  # fmt: skip
    tokens = model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=config, streamer=streamer)
    written: list[int] = tokens[0, inputs.shape[1] :].tolist()
    return written


def _prompt_tokens(loaded: Loaded, prompt: str, chat: bool) -> torch.Tensor:
    """Return the (1, tokens) int64 tokens of the prompt."""
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise CalibrationError(f"{loaded.origin} has no tokenizer, so it cannot read a prompt; save one beside the model")
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise UnsupportedError(f"{loaded.origin} has no chat template; leave --chat out to continue plain text")
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
    ids = list(tokenizer(prompt, add_special_tokens=not chat)["input_ids"])
    if not ids:
        raise CalibrationError("the prompt is empty; give some text to continue")
    return torch.tensor([ids], dtype=torch.int64)


def _streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                on_text(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
