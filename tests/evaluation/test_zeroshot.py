"""Multiple choice: scores against whole-sequence likelihoods, batching, and files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors

from llm_fp4.errors import CalibrationError, NonFiniteError
from llm_fp4.evaluation import ANSWER, Item, log_likelihoods, read_items, score_choices
from llm_fp4.evaluation.zeroshot import encode_pair

ITEMS = [
    Item("Question: what is it?", ("a cat", "a very long dog indeed", "x"), 1),
    Item("Another\n", ("yes", "no"), 0),
    Item("", ("alone", "together"), 1),
    *[Item(f"number {i} of many", tuple("word" * n + str(i) for n in range(1, 5)), i % 4) for i in range(12)],
]


def plain(model: Any, tokens: list[int], begin: int) -> float:
    """Log-likelihood of tokens[begin:], one sequence alone."""
    with torch.no_grad():
        log_p = torch.log_softmax(model(input_ids=torch.tensor([tokens])).logits[0].double(), -1)
    return sum(float(log_p[i - 1, tokens[i]]) for i in range(begin, len(tokens)))


def test_choices_are_scored_as_whole_sequences(tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model, right, right_norm = tiny_llama(), 0, 0
    for item in ITEMS:
        scores = []
        for choice in item.choices:
            before, after = (item.query.rstrip() or "<s>"), item.query[len(item.query.rstrip()) :] + " " + choice
            begin = len(tiny_tokenizer(before)["input_ids"])
            scores.append(plain(model, tiny_tokenizer(before + after)["input_ids"], begin))
        per_byte = [score / len(choice) for score, choice in zip(scores, item.choices, strict=True)]
        right += scores.index(max(scores)) == item.gold
        right_norm += per_byte.index(max(per_byte)) == item.gold
    found = score_choices(model, tiny_tokenizer, ITEMS)
    assert found.n == len(ITEMS)
    assert found.acc == right / len(ITEMS)
    assert found.acc_norm == right_norm / len(ITEMS)
    assert right != right_norm  # the items tell the two apart


@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_batches_do_not_change_the_scores(tiny_llama: Callable[..., Any], batch_tokens: int) -> None:
    model = tiny_llama()
    generator = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randint(258, (n,), generator=generator).tolist(), torch.randint(258, (m,), generator=generator).tolist())
        for n, m in [(1, 1), (9, 2), (30, 7), (2, 40), (9, 2), (5, 1)]
    ]
    seen: list[tuple[str, int, int]] = []
    found = log_likelihoods(model, pairs, batch_tokens=batch_tokens, progress=lambda *report: seen.append(report))
    assert found == pytest.approx([plain(model, a + b, len(a)) for a, b in pairs], rel=1e-5)
    assert seen[-1] == ("zero-shot", 6, 6)


def test_a_sequence_longer_than_the_model_loses_its_beginning(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(max_position_embeddings=16)
    before, after = list(range(2, 32)), [40, 41, 42]
    tokens = (before + after)[-17:]
    assert log_likelihoods(model, [(before, after)]) == pytest.approx([plain(model, tokens, 14)], rel=1e-5)


def test_blanks_between_context_and_choice_belong_to_the_choice(tiny_tokenizer: Any) -> None:
    def decoded(context: str, continuation: str) -> list[str]:
        pair = encode_pair(tiny_tokenizer, context, continuation)
        return [tiny_tokenizer.decode(tokens, clean_up_tokenization_spaces=False) for tokens in pair]

    assert decoded("a b", " c") == ["a b", " c"]
    assert decoded("a b \n", " c") == ["a b", " \n c"]
    assert decoded("", " c") == ["<s>", " c"]


def test_a_tokenizers_own_bos_is_context(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    before, after = encode_pair(tiny_tokenizer, "ab", " c")
    assert before[0] == 0
    assert (len(before), len(after)) == (3, 2)


def test_the_suffix_follows_the_query(tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_llama()
    spelled = [Item(item.query.rstrip() + "\nAnswer:", item.choices, item.gold) for item in ITEMS]
    assert score_choices(model, tiny_tokenizer, ITEMS, suffix=ANSWER) == score_choices(model, tiny_tokenizer, spelled)


def test_a_model_that_knows_the_answers_is_right(tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(260))
    with torch.no_grad():
        model.lm_head.bias[tiny_tokenizer("y")["input_ids"]] = 5.0
    items = [Item("q", ("nnn", "yyy"), 1), Item("q", ("yyn", "nnn"), 0), Item("q", ("yyy", "nnn"), 1)]
    assert score_choices(model, tiny_tokenizer, items).acc == 2 / 3


def test_nothing_to_score_and_a_broken_model(tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_llama()
    with pytest.raises(CalibrationError, match="no zero-shot question"):
        score_choices(model, tiny_tokenizer, [])
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="NaN logits on a zero-shot question"):
        score_choices(model, tiny_tokenizer, ITEMS)


def test_items_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"query": i.query, "choices": i.choices, "gold": i.gold}) for i in ITEMS))
    assert read_items(path) == ITEMS
    assert read_items(path, limit=2) == ITEMS[:2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"choices": ["a"], "gold": 0}', r"line 2 has no string 'query'"),
        ('{"query": "q", "choices": ["a", 1], "gold": 0}', r"line 2 has no list of non-empty strings 'choices'"),
        ('{"query": "q", "choices": [], "gold": 0}', r"line 2 has no list of non-empty strings 'choices'"),
        ('{"query": "q", "choices": ["a", "b"], "gold": 2}', r"line 2 has 'gold' 2, not the number of one of its 2 choices"),
        ('{"query": "q", "choices": ["a", "b"]}', r"line 2 has 'gold' None"),
        ("{", r"line 2 is not valid JSON"),
    ],
)
def test_a_bad_item_names_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"query": "q", "choices": ["a", "b"], "gold": 1}\n' + line)
    with pytest.raises(CalibrationError, match=message):
        read_items(path)


def test_an_empty_or_missing_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(CalibrationError, match="holds no question"):
        read_items(tmp_path / "a.jsonl")
    with pytest.raises(CalibrationError, match="cannot be read: No such file"):
        read_items(tmp_path / "b.jsonl")


def test_real_items_are_read(shared_data: Path) -> None:
    for name, choices in (("arc_easy", range(3, 6)), ("piqa", range(2, 3))):
        items = read_items(shared_data / "zeroshot" / f"{name}.jsonl")
        assert len(items) > 1000
        assert {len(item.choices) for item in items} <= set(choices)
