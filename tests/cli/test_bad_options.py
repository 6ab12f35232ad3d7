"""Options and recipes that cannot be followed are refused, with exit code 2, before anything is loaded or written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bits", "4/4/99"], "99 bits is not possible"),
        (["--bits", "4/4"], "not embedding/weight/activation bits"),
        (["--bits", "2/4/4"], "2 bits is not possible"),
        (["--lm-head-bits", "1"], "1 bits is not possible"),
        (["--recipe", "fqp"], "no recipe 'fqp'"),
    ],
)
def test_impossible_options(refused: Any, tmp_path: Path, options: list[str], words: str) -> None:
    assert words in refused("quantize", tmp_path / "not-even-there", tmp_path / "out", *options, "--quiet", code=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("method: fpq\nbitz: {weight: 4}\n", "unknown key 'bitz'"),
        ("search: {effort: 3}\n", "unknown key 'effort' in search; known there: bias_correction"),
        ("overrides: [{targets: [q_proj], bits: 8}]\n", "unknown key 'bits' in overrides.0; known there: activation_bits"),
        ("bits: 4/4/4\n", "bits holds keys and values; write bits: {embedding: 4, weight: 4, activation: 4}"),
        ("ignore: lm_head\n", "ignore is a list; write ignore: [lm_head]"),
        (
            "inputs: {shift_range: foo}\n",
            "inputs.shift_range: a shift range of foo is not possible; choose 0 to 15, format, int8, search or every",
        ),
        ("transforms: {online: true}\n", "transforms.online serves what a rotation does not reach"),
        ("method: minmax\nsearch: {compensation: gptq}\n", "search.compensation goes with a search, and method minmax has none"),
        ("method: smoothquant\nsearch: {bias_correction: true}\n", "search.bias_correction goes with a search"),
        ("method: minmax\ninputs: {offset: mean}\n", "inputs.offset goes with a search, and method minmax has none"),
        ("method: smoothquant\ninputs: {offset: mean}\n", "inputs.offset goes with a search, and method smoothquant has none"),
        ("method: magic\n", "method"),
        ("weights: {formats: [e9m9]}\n", "e9m9"),
        ("- a\n- b\n", "must be a mapping"),
        ("a: [\n", "is not YAML"),
    ],
)
def test_recipes_that_cannot_be_followed(refused: Any, tmp_path: Path, recipe: str, words: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(recipe)
    sentence = refused("quantize", tmp_path / "not-even-there", tmp_path / "out", "--recipe", path, "--quiet", code=2)
    assert words in sentence
    assert "mine.yaml" in sentence


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ignore", "nothing_proj"], "pattern 'nothing_proj' in ignore matches no module"),
        (["--ignore", "re:["], "pattern 're:[' is no regular expression (unterminated character set at position 0)"),
        (["--targets", "re:.*conv"], "pattern 're:.*conv' in targets matches no module"),
        (["--bits", "16/16/16"], "leave every selected layer in float"),
        (["--bits", "4/16/4"], "quantized input and a float weight"),
    ],
)
def test_recipes_that_do_not_fit_the_model(refused: Any, source: Path, tmp_path: Path, options: list[str], words: str) -> None:
    assert words in refused("quantize", source, tmp_path / "out", *options, "--quiet", code=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_nothing_left_to_quantize(refused: Any, source: Path, tmp_path: Path) -> None:
    assert "leave no layer" in refused("quantize", source, tmp_path / "out", "--ignore", "*", "--quiet")


def test_existing_output(refused: Any, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert "exists already" in refused("quantize", source, out, "--quiet")
    assert not list(out.iterdir())
    for here in (".", "..", "/"):
        assert "exists already" in refused("quantize", source, here, "--quiet")


def test_partial_directory_of_something_else(refused: Any, source: Path, tmp_path: Path) -> None:
    mine = tmp_path / "out.partial" / "letters.txt"
    mine.parent.mkdir()
    mine.write_text("keep me")
    assert "letters.txt" in refused("quantize", source, tmp_path / "out", "--quiet")
    assert mine.read_text() == "keep me"


def test_output_that_cannot_be_made(refused: Any, source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused("quantize", source, tmp_path / "file" / "out", "--quiet")


def test_no_such_device(refused: Any, source: Path, tmp_path: Path) -> None:
    assert "unknown device 'abacus'" in refused("quantize", source, tmp_path / "out", "--device", "abacus", "--quiet")


@pytest.mark.parametrize(
    "arguments",
    [["quantize"], ["quantize", "a", "b", "--sequences", "0"], ["eval", "a"], ["eval", "a", "--reference", "b"], ["nonsense"]],
)
def test_usage_errors(llm_fp4: Any, arguments: list[str]) -> None:
    result = llm_fp4(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error" in result.stderr


def test_evaluation_that_cannot_be(refused: Any, source: Path, text: Path, tmp_path: Path) -> None:
    assert "set a length of 256" in refused("eval", source, "--text", text, "--length", "512", "--quiet")
    (tmp_path / "short.txt").write_text("abc")
    assert "not one window of 64" in refused("eval", source, "--text", tmp_path / "short.txt", "--length", "64", "--quiet")
    assert "--text" in refused(
        "eval", tmp_path / "no-model", "--text", tmp_path / "no.txt", "--quiet"
    )  # told before anything is loaded
    assert "--table" in refused("eval", tmp_path / "no-model", "--table", tmp_path / "no.csv", "--quiet")
    assert "holds no config.json" in refused("eval", tmp_path / "no-model", "--text", text, "--card", "--quiet")
    assert "no.jsonl" in refused("eval", source, "--zeroshot", tmp_path / "no.jsonl", "--quiet")


def test_empty_prompt(refused: Any, source: Path) -> None:
    assert "the prompt is empty" in refused("generate", source, "", "--quiet")
