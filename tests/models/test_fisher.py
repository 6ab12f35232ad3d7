"""The Fisher-weighted objective end to end: any family, on disk as in memory, resumable, with the labels of a table."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_fp4
from llm_fp4.api import estimate, gradient_memory
from llm_fp4.api.fisher import STAGE
from llm_fp4.errors import CalibrationError, RecipeError
from llm_fp4.models import find_structure, open_model
from llm_fp4.recipe import Recipe, load_recipe

from .families import batch, build, scores

SEARCH = {"rounds": 1, "objective": "fisher"}
RULES = Recipe.model_validate({"search": SEARCH, "attention": {"bits": 4}})
PLAIN = Recipe.model_validate({"search": {"rounds": 1}, "attention": {"bits": 4}})


def saved(family: str, folder: Path) -> Path:
    build(family).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["GPT-2", "BERT", "DistilBERT", "ViT", "Swin", "CLIP", "Whisper", "T5", "wav2vec2"])
def test_every_family_on_disk_as_in_memory_and_otherwise_than_by_output_error(family: str, tmp_path: Path) -> None:
    data = batch(family)
    out = llm_fp4.quantize(saved(family, tmp_path / "float"), tmp_path / "out", RULES, batches=[data])
    memory = llm_fp4.quantize_module(build(family), [data], RULES)
    plain = llm_fp4.quantize_module(build(family), [data], PLAIN)
    with torch.no_grad():
        ours, expected, other = (scores(m(**data)) for m in (llm_fp4.load(out), memory, plain))
    assert torch.allclose(ours, expected, atol=1e-5 * float(expected.abs().max()))
    assert not torch.allclose(ours, other, atol=1e-3 * float(other.abs().max()))


def test_a_killed_run_ends_with_the_same_bytes_and_differentiates_once(tmp_path: Path) -> None:
    source, data, passes = saved("T5", tmp_path / "float"), batch("T5"), []

    def digest(folder: Path) -> dict[str, str]:
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}

    def killed(stage: str, done: int, total: int) -> None:
        if stage == STAGE and done == total:
            passes.append(stage)
        if stage == "quantize" and stops and done == stops[0]:
            stops.pop(0)
            raise KeyboardInterrupt

    stops = [0, 1, 3]
    whole = digest(llm_fp4.quantize(source, tmp_path / "whole", RULES, batches=[data]))
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            llm_fp4.quantize(source, tmp_path / "out", RULES, batches=[data], progress=killed)
    assert digest(llm_fp4.quantize(source, tmp_path / "out", RULES, batches=[data], progress=killed)) == whole
    assert len(passes) <= 2  # the run killed before its first unit may begin anew


def test_labels_of_a_table_count(tmp_path: Path, tiny_tokenizer: Any) -> None:
    tiny_tokenizer.pad_token = tiny_tokenizer.eos_token
    source = tmp_path / "float"
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64,
        initializer_range=0.2, pad_token_id=1,
    )  # fmt: skip
    RobertaForSequenceClassification(config).save_pretrained(source)
    tiny_tokenizer.save_pretrained(source)

    def plan(labels: list[str]) -> Any:
        table = tmp_path / f"{'-'.join(labels)}.tsv"
        table.write_text("sentence\tlabel\n" + "".join(f"a sentence of number {i}\t{x}\n" for i, x in enumerate(labels)))
        rules = Recipe.model_validate({"search": SEARCH, "calibration": {"source": str(table), "length": 32}})
        out = llm_fp4.quantize(source, tmp_path / f"out-{'-'.join(labels)}", rules)
        return json.loads((out / "plan.json").read_text())["inputs"]

    assert plan(["0", "1", "1"]) != plan(["1", "0", "0"])
    with pytest.raises(CalibrationError, match="label 'good' is no class number"):
        plan(["good", "bad"])


def test_a_model_larger_than_memory_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_fp4.api.calibrate._free_memory", lambda: 1000)
    source = saved("GPT-2", tmp_path / "float")
    with pytest.raises(CalibrationError, match=r"differentiates the float model.*use --objective output"):
        llm_fp4.quantize(source, tmp_path / "out", RULES, batches=[batch("GPT-2")])
    assert not list(tmp_path.glob("out*"))


def test_the_estimate_counts_the_gradients(tmp_path: Path) -> None:
    source = saved("GPT-2", tmp_path / "float")
    opened = open_model(str(source))
    need = gradient_memory(opened.model, find_structure(opened.model), RULES.calibration.length)
    fisher, plain = estimate(source, RULES), estimate(source, PLAIN)
    assert fisher.memory == need > plain.memory
    assert fisher.passes > plain.passes


@pytest.mark.parametrize("fields", [{"method": "minmax"}, {"transforms": {"rotation": "hadamard"}}])
def test_what_fisher_cannot_weigh_is_refused_by_name(tmp_path: Path, fields: dict[str, Any]) -> None:
    import yaml

    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"search": {"objective": "fisher"}, **fields}))
    with pytest.raises(RecipeError, match=r"search\.objective fisher"):
        load_recipe(str(tmp_path / "mine.yaml"))


def test_the_command_says_what_memory_it_takes_before_it_starts(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    from typer.testing import CliRunner

    from llm_fp4.cli.main import app

    tiny_llama().save_pretrained(tmp_path / "float")
    tiny_tokenizer.save_pretrained(tmp_path / "float")
    options = ["--sequences", "2", "--length", "16", "--rounds", "1", "--objective", "fisher"]
    result = CliRunner().invoke(app, ["quantize", str(tmp_path / "float"), str(tmp_path / "out"), *options])
    assert result.exit_code == 0, result.output
    cost, memory = result.stderr.splitlines()[:2]
    assert cost.startswith("fpq 4/4/4: about ")
    assert memory.startswith("objective fisher differentiates the whole float model first: about ")
    assert load_recipe(str(tmp_path / "out" / "recipe.yaml")).search.objective == "fisher"
