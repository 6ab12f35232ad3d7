"""The model card, README.md of a checkpoint, and the figures that ``llm-fp4 eval --card`` writes into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from llm_fp4.api.provenance import source_name
from llm_fp4.checkpoint import read_config
from llm_fp4.errors import CheckpointError
from llm_fp4.models import FloatModel
from llm_fp4.storage import write_text

FILE = "README.md"
_BEGIN, _END = "<!-- measured -->", "<!-- end of measured -->"
_HEAD = "| measured on | what | value |"
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")  # of the source's own card


def model_card(opened: FloatModel, description: dict[str, Any], fingerprint: dict[str, Any], architecture: str) -> str:
    """Return the text of a new checkpoint's card.

    Args:
        description: recipe, method and bits, as in the manifest.
    """
    name = source_name(opened)
    front: dict[str, Any] = {k: v for k, v in source_card(opened).items() if k in _KEPT}
    if name is not None and opened.gguf is None:
        front |= {"base_model": name, "base_model_relation": "quantized"}
    front |= {"library_name": "transformers", "tags": ["llm-fp4", "4-bit", "fp4", "quantized"]}
    versions = ", ".join(f"{k} {v}" for k, v in fingerprint["versions"].items())
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---

# {f"{name}, " if name else ""}{description["bits"]} with llm-fp4

{architecture}, quantized to floating-point formats after training by the method of [LLM-FP4](https://arxiv.org/abs/2310.16836):
recipe `{description["recipe"]}` ({description["method"]}), {description["bits"]} bits of embedding, weights and activations (16 is float).
`recipe.yaml` holds the whole recipe, `plan.json` what was decided for each layer.

```python
import llm_fp4  # before from_pretrained: without it transformers only warns, and leaves random weights
from transformers import AutoTokenizer, {architecture}

model = {architecture}.from_pretrained("this repository")
tokenizer = AutoTokenizer.from_pretrained("this repository")
```

`llm-fp4 inspect` shows each layer's format, scales and error; `llm-fp4 doctor` checks the files.

{_BEGIN}
Nothing was measured yet: `llm-fp4 eval DIR --text FILE --reference SRC --card` writes its figures here.
{_END}

Made by {versions}. SHA-256 of the source {fingerprint["source"]["sha256"]}, of the recipe {fingerprint["recipe"]["sha256"]}, of the
calibration data {fingerprint["data"]["sha256"]}.
"""


def source_card(opened: FloatModel) -> dict[str, Any]:
    """Return what the source says of itself: the front of its README.md, or the licence in a GGUF file."""
    if opened.gguf is not None:
        import gguf

        field = gguf.GGUFReader(opened.folder / opened.gguf).fields.get("general.license")
        return {} if field is None else {"license": str(field.contents())}
    try:
        text = (opened.folder / FILE).read_text(encoding="utf-8")
        front = yaml.safe_load(text.split("---\n", 2)[1]) if text.startswith("---\n") else None
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return {}
    return front if isinstance(front, dict) else {}


def check_card(folder: Path) -> tuple[str, str, str]:
    """Return the card of a checkpoint before, between and after the lines that figures are written between.

    Raises:
        CheckpointError: ``folder`` is no checkpoint of ours, or its card has no place for figures.
    """
    read_config(folder)
    path = folder / FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, begin, rest = text.partition(_BEGIN)
    old, end, after = rest.partition(_END)
    if not begin or not end:
        raise CheckpointError(f"{path} has no lines {_BEGIN} and {_END} to write between; add them, or quantize again")
    return before, old, after


def add_figures(folder: Path, rows: list[tuple[str, str, str]]) -> Path:
    """Write ``rows`` (measured on, what, value) into the card's table, over older ones of the same first two, and return its path.

    Raises:
        CheckpointError: see :func:`check_card`. OutputError: it cannot be written.
    """
    before, old, after = check_card(folder)
    path = folder / FILE
    cells = [tuple(c.strip() for c in line.strip("| ").split(" | ")) for line in old.splitlines() if line.startswith("| ")]
    kept = {c[:2]: c[2] for c in cells if len(c) == 3 and c[0] not in ("measured on", "---")}
    kept |= {(on, what): value for on, what, value in rows}
    table = "\n".join([_HEAD, "| --- | --- | --- |", *(f"| {on} | {what} | {value} |" for (on, what), value in kept.items())])
    write_text(path, f"{before}{_BEGIN}\n{table}\n{_END}{after}")
    return path


def card_rows(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the rows of what ``llm-fp4 eval`` found: file or task, metric, value."""
    rows: list[tuple[str, str, str]] = []

    def add(on: str, **values: Any) -> None:
        rows.extend(
            (on, what.replace("_", " "), f"{v:.4g}" if isinstance(v, float) else str(v))
            for what, v in values.items()
            if v is not None
        )

    texts = [(f"{Path(t['file']).name}, windows of {t['length']} tokens", t) for t in [result.get("text")] if t]
    texts += [(f"{Path(result['context_file']).name}, context of {n} tokens", t) for n, t in result.get("context", {}).items()]
    for on, found in texts:
        m, flat = found["model"], found.get("float", {})
        add(on, perplexity=m["perplexity"], perplexity_of_the_float_model=flat.get("perplexity"), KL_to_the_float_model=m.get("kl"),
            top_1_agreement=m.get("top1"), tokens=m["tokens"])  # fmt: skip
    for kind in ("zeroshot", "tasks"):
        for name, values in result.get(kind, {}).items():
            add(name, **values)
    if "images" in result:
        add(f"images, {result['images']['model']['n']}", **{k: v for k, v in result["images"]["model"].items() if k != "n"})
    for kind in ("table", "audio"):
        if kind in result:
            add(kind, **{k: v for k, v in result[kind].items() if k != "texts"})
    return rows
