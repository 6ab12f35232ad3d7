"""lm-eval on a local task: it must find what our own scorer finds."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_fp4.errors import CalibrationError, UnsupportedError
from llm_fp4.evaluation import Item, evaluate_tasks, score_choices

pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval and the libraries it loads

ITEMS = [
    Item(f"Question: how {'very ' * (i % 3)}odd is {i}?\n", tuple(f"{'so ' * n}{i * n}" for n in range(1, 4)), i % 3)
    for i in range(9)
]

TASK = """
task: odd_questions
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    data, folder = tmp_path / "items.jsonl", tmp_path / "tasks"
    data.write_text("\n".join(json.dumps({"query": i.query, "choices": i.choices, "gold": i.gold}) for i in ITEMS))
    folder.mkdir()
    (folder / "odd.yaml").write_text(TASK.format(data=data, cache=tmp_path / "cache"))
    return folder


def test_a_local_task_agrees_with_our_scorer(tasks: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is optional")
    model = tiny_llama().train()
    found = evaluate_tasks(model, tiny_tokenizer, ["odd_questions"], include_path=tasks)["odd_questions"]
    ours = score_choices(model, tiny_tokenizer, ITEMS)
    assert model.training
    assert found["acc"] == pytest.approx(ours.acc)
    assert found["acc_norm"] == pytest.approx(ours.acc_norm)  # the choices are ASCII: bytes are characters
    assert ours.acc != ours.acc_norm
    first = evaluate_tasks(model, tiny_tokenizer, ["odd_questions"], limit=4, include_path=tasks)["odd_questions"]
    assert first["acc"] == score_choices(model, tiny_tokenizer, ITEMS[:4]).acc


def test_an_unknown_task_and_folder(tasks: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is optional")
    with pytest.raises(UnsupportedError, match="task 'nonesuch' is not known to lm-eval; known: odd_questions"):
        evaluate_tasks(tiny_llama(), tiny_tokenizer, ["nonesuch"], include_path=tasks)
    with pytest.raises(UnsupportedError, match="no task is named"):
        evaluate_tasks(tiny_llama(), tiny_tokenizer, [], include_path=tasks)
    with pytest.raises(CalibrationError, match="absent does not exist"):
        evaluate_tasks(tiny_llama(), tiny_tokenizer, ["odd_questions"], include_path=tasks / "absent")


def test_missing_data_of_a_task(tasks: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is optional")
    (tasks.parent / "items.jsonl").unlink()
    with pytest.raises(CalibrationError, match=r"lm-eval cannot run odd_questions: .*check the task's data"):
        evaluate_tasks(tiny_llama(), tiny_tokenizer, ["odd_questions"], include_path=tasks)


def test_without_lm_eval_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(CalibrationError, match=r"pip install llm-fp4\[evaluation\]"):
        evaluate_tasks(None, tiny_tokenizer, ["arc_easy"])
