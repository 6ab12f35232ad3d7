"""lm-eval on a local task: it must find what our own scorer finds."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_fp4.errors import CalibrationError, UnsupportedError
from llm_fp4.evaluation import PAPER, Item, evaluate_tasks, score_choices

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


SAYING = """
task: saying
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: generate_until
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n"], do_sample: false, max_gen_toks: 5}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
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


def test_a_generative_task(tasks: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is optional")
    import torch

    model = tiny_llama()
    queries = [f"The {word} sea" for word in ("wide", "deep", "old", "cold")]
    said = []
    for query in queries:
        ids = torch.tensor([tiny_tokenizer(query)["input_ids"]])
        new = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=1)[0, ids.shape[1] :]
        said.append(tiny_tokenizer.decode(new, skip_special_tokens=True))
    answers = [*said[:3], "what it does not say"]
    data = tmp_path / "sayings.jsonl"
    data.write_text("\n".join(json.dumps({"query": q, "answer": a}) for q, a in zip(queries, answers, strict=True)))
    (tasks / "saying.yaml").write_text(SAYING.format(data=data, cache=tmp_path / "cache"))
    found = evaluate_tasks(model, tiny_tokenizer, ["saying", "odd_questions"], include_path=tasks)
    assert found["saying"]["exact_match"] == 0.75
    assert found["odd_questions"]["acc"] == pytest.approx(score_choices(model, tiny_tokenizer, ITEMS).acc)


def test_the_six_tasks_of_the_paper(tasks: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is optional")
    from lm_eval.tasks import TaskManager

    assert set(PAPER) <= set(TaskManager().all_tasks)  # by these names they are lm-eval's own
    with pytest.raises(UnsupportedError, match="task 'boolq' is not known"):  # a folder of tasks stands in their place
        evaluate_tasks(tiny_llama(), tiny_tokenizer, ["paper"], include_path=tasks)
    one = (tasks / "odd.yaml").read_text()
    for name in PAPER:
        (tasks / f"{name}.yaml").write_text(one.replace("task: odd_questions", f"task: {name}"))
    found = evaluate_tasks(tiny_llama(), tiny_tokenizer, ["paper"], limit=3, include_path=tasks)
    assert set(found) == {*PAPER, "paper"}
    assert found["paper"]["acc"] == pytest.approx(found["piqa"]["acc"])


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
    with pytest.raises(CalibrationError, match=r"pip install 'llm-fp4\[evaluation\]'"):
        evaluate_tasks(None, tiny_tokenizer, ["arc_easy"])
