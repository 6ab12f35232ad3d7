"""Tasks of lm-eval, the field's evaluation harness, on a model in memory. Optional; loaded when used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_fp4.errors import CalibrationError, UnsupportedError

# the six zero-shot tasks of LLM-FP4, Table 1, all judged by "acc"
PAPER = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge")
SIX = "paper"  # what names all of them


def evaluate_tasks(
    model: Any, tokenizer: Any, tasks: list[str], limit: int | None = None, include_path: str | Path | None = None,
    batch_size: int = 1,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Return, for each task, its metrics and their standard errors as lm-eval reports them, such as "acc".

    Args:
        model: a transformers causal model, already loaded. tokenizer: its own.
        tasks: names; "paper" is the six tasks of LLM-FP4, and the mean of their "acc" is then returned under that name.
        limit: questions a task, all by default.
        include_path: a folder of task files (YAML) to use instead of lm-eval's own; local data needs no network.
    Raises:
        CalibrationError: lm-eval is missing, or a task's data cannot be read.
        UnsupportedError: a task that is not known; the message names some that are.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise CalibrationError("evaluating lm-eval tasks needs lm-eval; install it: pip install 'llm-fp4[evaluation]'") from error
    if not tasks:
        raise UnsupportedError("no task is named; name at least one, such as arc_easy")
    folder = None if include_path is None else str(include_path)
    if folder is not None and not Path(folder).is_dir():
        raise CalibrationError(f"task folder {folder} does not exist; check the path")
    six = SIX in tasks
    tasks = list(dict.fromkeys(t for task in tasks for t in (PAPER if task == SIX else (task,))))
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        known = ", ".join(manager.all_tasks[:10]) + (" ..." if len(manager.all_tasks) > 10 else "")
        raise UnsupportedError(f"task {unknown[0]!r} is not known to lm-eval; known: {known or 'none'}")
    training = model.training
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        results = lm_eval.simple_evaluate(
            model=harness, tasks=tasks, limit=limit, task_manager=manager, log_samples=False, bootstrap_iters=0
        )
    except (OSError, ValueError) as error:  # what its data sets raise for a missing file or network
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CalibrationError(f"lm-eval cannot run {', '.join(tasks)}: {reason}; check the task's data and the network") from error
    finally:
        model.train(training)
    # lm-eval's keys are "metric,filter"
    found = {
        task: {key.split(",")[0]: float(value) for key, value in metrics.items() if isinstance(value, float)}
        for task, metrics in results["results"].items()
    }
    if six:
        found[SIX] = {"acc": sum(found[task]["acc"] for task in PAPER) / len(PAPER)}
    return found
