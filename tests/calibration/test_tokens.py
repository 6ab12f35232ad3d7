"""From text to a tensor of tokens: separators, bounded reading, windows, and messages about too little text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from llm_fp4.calibration import draw_windows, load_tokens, token_stream
from llm_fp4.calibration.tokens import STRETCH
from llm_fp4.errors import CalibrationError

BOS, EOS = 0, 1


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_documents_are_joined_by_eos(tiny_tokenizer: Any) -> None:
    stream = token_stream([("ab", True), ("c", False), ("", True), ("d", True)], tiny_tokenizer)
    assert stream.tolist() == [*ids(tiny_tokenizer, "abc"), EOS, *ids(tiny_tokenizer, "d")]
    assert stream.dtype == torch.int64


def test_bos_begins_a_document_where_the_tokenizer_puts_it(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    stream = token_stream([("ab", True), ("d", True)], tiny_tokenizer)
    assert stream.tolist() == [BOS, *ids(tiny_tokenizer, "ab"), EOS, BOS, *ids(tiny_tokenizer, "d")]


def test_without_eos_bos_separates_and_without_either_nothing(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.eos_token = None
    assert token_stream([("a", True), ("b", True)], tiny_tokenizer).tolist() == [
        *ids(tiny_tokenizer, "a"), BOS, *ids(tiny_tokenizer, "b"),
    ]  # fmt: skip
    tiny_tokenizer.bos_token = None
    assert token_stream([("a", True), ("b", True)], tiny_tokenizer).tolist() == ids(tiny_tokenizer, "ab")


def test_a_long_document_is_tokenized_in_stretches_without_loss(tiny_tokenizer: Any) -> None:
    text = "word " * STRETCH + "x" * (2 * STRETCH + 3)
    assert tiny_tokenizer.decode(token_stream([(text, True)], tiny_tokenizer), clean_up_tokenization_spaces=False) == text


def test_reading_stops_when_there_is_enough(tiny_tokenizer: Any) -> None:
    read = 0

    def endless() -> Iterator[tuple[str, bool]]:
        nonlocal read
        while True:
            read += 1
            yield "x" * 9, True

    seen: list[tuple[str, int, int]] = []
    stream = token_stream(endless(), tiny_tokenizer, 95, lambda *report: seen.append(report), "read")
    assert len(stream) == 95
    assert read == 10
    assert seen[0] == ("read", 9, 95)
    assert seen[-1] == ("read", 95, 95)


@given(sequences=st.integers(1, 8), length=st.integers(1, 9), slack=st.integers(0, 30), seed=st.integers(0, 2**31))
def test_windows_are_consecutive_and_do_not_overlap(sequences: int, length: int, slack: int, seed: int) -> None:
    tokens = torch.arange(sequences * length + slack)
    drawn = draw_windows(tokens, sequences, length, seed)
    assert drawn.shape == (sequences, length)
    assert bool((drawn.diff(dim=1) == 1).all())
    assert len(drawn.unique()) == sequences * length
    assert torch.equal(drawn, draw_windows(tokens, sequences, length, seed))


def test_windows_reach_everywhere() -> None:
    first = torch.stack([draw_windows(torch.arange(10), 2, 3, seed)[:, 0] for seed in range(300)])
    assert set(first.flatten().tolist()) == set(range(8))


def test_load_draws_windows_of_the_text(tmp_path: Path, tiny_tokenizer: Any) -> None:
    text = "".join(f"{i} green bottles, " for i in range(400))
    (tmp_path / "a.txt").write_text(text)
    load = {"tokenizer": tiny_tokenizer, "sequences": 5, "length": 40}
    drawn = load_tokens(tmp_path / "a.txt", seed=1, **load)
    assert drawn.shape == (5, 40)
    assert all(tiny_tokenizer.decode(row, clean_up_tokenization_spaces=False) in text for row in drawn)
    assert torch.equal(drawn, load_tokens(str(tmp_path / "a.txt"), seed=1, **load))
    assert not torch.equal(drawn, load_tokens(tmp_path / "a.txt", seed=2, **load))


def test_load_reads_no_more_than_it_needs(tmp_path: Path, tiny_tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_bytes(b"good text\n" * 50_000 + b"\xff")  # an error behind what is needed
    assert load_tokens(tmp_path / "a.txt", tiny_tokenizer, sequences=4, length=32, seed=0).shape == (4, 32)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"a\.txt is empty; give a text of at least 64 tokens"),
        ("x" * 50, r"holds 50 tokens, but 4 sequences of 16 need 64; give a longer text, or set --sequences 3"),
        ("x" * 9, r"holds 9 tokens, .* set --sequences 1 --length 9 at most"),
    ],
)
def test_too_little_text_says_how_much_and_what_to_set(tmp_path: Path, tiny_tokenizer: Any, text: str, message: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(CalibrationError, match=message):
        load_tokens(tmp_path / "a.txt", tiny_tokenizer, sequences=4, length=16, seed=0)


def test_just_enough_text(tmp_path: Path, tiny_tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("x" * 64)
    assert load_tokens(tmp_path / "a.txt", tiny_tokenizer, sequences=4, length=16, seed=0).shape == (4, 16)


def test_what_does_not_fit_the_model_is_refused(tmp_path: Path, tiny_tokenizer: Any, tiny_llama: Callable[..., Any]) -> None:
    (tmp_path / "a.txt").write_text("ÿ" * 600)
    sizes = {"sequences": 1, "seed": 0, "model": tiny_llama(vocab_size=20)}
    with pytest.raises(CalibrationError, match=r"the tokenizer gives token \d+, but the model knows only 20"):
        load_tokens(tmp_path / "a.txt", tiny_tokenizer, length=9, **sizes)
    with pytest.raises(CalibrationError, match=r"at most 256 tokens, not 257; set --length 256"):
        load_tokens(tmp_path / "a.txt", tiny_tokenizer, length=257, **sizes)


def test_bad_counts_and_self_without_a_model(tiny_tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match="--sequences 0"):
        load_tokens("a.txt", tiny_tokenizer, sequences=0, length=4, seed=0)
    with pytest.raises(CalibrationError, match="'self' needs the float model"):
        load_tokens("self", tiny_tokenizer, sequences=1, length=4, seed=0)
