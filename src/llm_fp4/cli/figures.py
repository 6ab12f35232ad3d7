"""What ``llm-fp4 eval`` measured, as tables for people."""

from __future__ import annotations

from typing import Any

from llm_fp4.cli.render import print_table


def show(result: dict[str, Any], path: str) -> None:
    """Print every part of ``result``, those of the model ``path`` first."""
    rows: list[tuple[Any, ...]]
    if "text" in result:
        text = result["text"]
        rows = [
            (path if name == "model" else "float reference", m["perplexity"], m["kl"], m["top1"], m["tokens"])
            for name, m in text.items() if name in ("float", "model")
        ]  # fmt: skip
        print_table(("model", "perplexity", "KL (nats)", "top-1 agreement", "tokens"), rows)
        if "gap" in text:
            print(f"ln(perplexity / float perplexity) = {text['gap']:.4f}")
    if "context" in result:
        columns = ("context", "perplexity", "float", "ln ratio", "KL (nats)", "top-1 agreement", "tokens")
        rows = []
        for length, found in result["context"].items():
            m, flat = found["model"], found.get("float", {}).get("perplexity")
            rows.append((length, m["perplexity"], flat, found.get("gap"), m["kl"], m["top1"], m["tokens"]))
        print_table(columns, rows)
    for sentence in result.get("warnings", []):
        print(f"warning: {sentence}")
    if "images" in result:
        rows = [
            (path if n == "model" else "float reference", m["top1"], m["top5"], m["agreement"], m["n"])
            for n, m in result["images"].items()
        ]
        print_table(("model", "top-1", "top-5", "agreement", "images"), rows)
    for what in ("table", "audio"):
        if what in result:
            print_table(("metric", "value"), [(n, v) for n, v in result[what].items() if n != "texts"])
    if "zeroshot" in result:
        rows = [(name, z["acc"], z["acc_norm"], z["n"]) for name, z in result["zeroshot"].items()]
        print_table(("questions", "acc", "acc_norm", "n"), rows)
    if "tasks" in result:
        rows = [(task, name, value) for task, values in result["tasks"].items() for name, value in values.items()]
        print_table(("task", "metric", "value"), rows)
