"""Evaluation text: WikiText's word-level form undone, files to tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from llm_fp4.errors import CalibrationError
from llm_fp4.evaluation import detokenize_wikitext, is_wikitext, read_tokens


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (" = Homarus gammarus = ", "= Homarus gammarus ="),
        (" = = = Mating season = = = ", "=== Mating season ==="),
        ("a well @-@ known 1 @,@ 000 @.@ 5 kg", "a well-known 1,000.5 kg"),
        ("60 cm ( 24 in ) , and 5 % of [ it ] .", "60 cm (24 in), and 5% of [it]."),
        ('called " lobster red " on cooking ; " the " too .', 'called "lobster red" on cooking; "the" too.'),
        ('he said : " it \'s done . " Then', 'he said: "it\'s done." Then'),
        ("don 't , can 't , we 'll , is n't", "don't, can't, we'll, isn't"),
        ("the lobsters ' claws", "the lobsters' claws"),
        ("a species of <unk> lobster , with <unk> .", "a species of lobster, with."),
        ('in a <unk> ( <unk> ) , the " <unk> " , or " a " " b " .', 'in a, the, or "a" "b".'),
        ("in 1932 @,@", "in 1932,"),
        ('an odd " one stays " a " b', 'an odd "one stays" a " b'),
        ("<unk> begins the <unk> @-@ like well @-@ <unk> , a @-@ <unk> @-@ b", "begins the like well, a b"),
        ("worth $ 5 million ?", "worth $5 million?"),
        ("", ""),
        ('Plain (really), its "marks" don\'t - change.', 'Plain (really), its "marks" don\'t - change.'),
        ("x = y + z", "x = y + z"),
    ],
)
def test_word_level_form_is_undone(words: str, text: str) -> None:
    assert detokenize_wikitext(words) == text


def test_lines_stay_lines() -> None:
    assert detokenize_wikitext(" \n = A = \n \n b . \n") == "\n= A =\n\nb.\n"


def test_real_wikitext_keeps_its_words(shared_data: Path) -> None:
    words = (shared_data / "text" / "wikitext2_valid_tokenized.txt").read_text(encoding="utf-8")
    text = detokenize_wikitext(words)
    assert is_wikitext(words)
    assert not is_wikitext(text)
    assert "<unk>" not in text
    assert " ," not in text
    assert " ." not in text.replace(" ...", "")
    # but for spacing, markers and the marks that held a lost word alone, nothing changes
    assert re.sub(r"\W", "", text) == re.sub(r"<unk>|\W", "", words)


def test_tokens_of_a_file_in_order(tmp_path: Path, tiny_tokenizer: Any) -> None:
    def read(**options: Any) -> str:
        return str(tiny_tokenizer.decode(read_tokens(path, tiny_tokenizer, **options), clean_up_tokenization_spaces=False))

    path = tmp_path / "a.txt"
    path.write_text(" = A = \n well @-@ known , <unk> !\n")
    assert read() == "= A =\nwell-known,!\n"
    assert read(tokens=5) == "= A ="
    assert read(wikitext=False) == " = A = \n well @-@ known , <unk> !\n"
    path.write_text("left , as it is\n")
    assert read() == "left , as it is\n"
    assert read(wikitext=True) == "left, as it is\n"


def test_an_empty_file_is_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(CalibrationError, match=r"a\.txt is empty"):
        read_tokens(tmp_path / "a.txt", tiny_tokenizer)
