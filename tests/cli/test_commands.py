"""Each command end to end on a tiny model, in this process."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

QUICK = ["--sequences", "2", "--length", "32", "--rounds", "1", "--quiet"]


def of_json(result: Any) -> Any:
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return json.loads(result.stdout)


def test_quantize_writes_a_checkpoint_and_tells_its_size(llm_fp4: Any, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = of_json(llm_fp4("quantize", source, out, "--json", *QUICK))
    assert told["layers"] == 16
    assert told["float_layers"] == 0
    assert told["bytes"] == sum(f.stat().st_size for f in out.glob("*.safetensors"))
    # float32: the embedding and the head (260·32 each), two blocks (7 linears, 2 norms), the last norm
    assert told["float_bytes"] == 4 * (2 * 260 * 32 + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32 + 2 * 32) + 32)
    assert sum(told["weight_formats"].values()) == 16
    assert sum(told["input_formats"].values()) == 15  # an embedding has none
    assert not out.with_name("out.partial").exists()


def test_quantize_shows_a_table(llm_fp4: Any, source: Path, tmp_path: Path) -> None:
    result = llm_fp4("quantize", source, tmp_path / "out", "--recipe", "minmax-fp", *QUICK)
    assert result.exit_code == 0
    assert "16 quantized, 0 left in float" in result.stdout
    assert "16 E2M1" in result.stdout
    assert "times smaller" in result.stdout


def test_options_override_the_recipe(llm_fp4: Any, source: Path, tmp_path: Path, text: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\nmethod: minmax\nbits: {weight: 6}\nseed: 4\nignore: [down_proj]\n")
    out = tmp_path / "out"
    arguments = [
        "--bits",
        "16/8/8",
        "--lm-head-bits",
        "4",
        "--ignore",
        "k_proj",
        "--ignore",
        "v_proj",
        "--calibration",
        text,
        "--propagation",
        "parallel",
    ]
    result = llm_fp4("quantize", source, out, "--recipe", recipe, *arguments, *QUICK)
    assert result.exit_code == 0, result.output
    kept = yaml.safe_load((out / "recipe.yaml").read_text())
    assert kept["name"] == "mine"
    assert kept["method"] == "minmax"
    assert kept["seed"] == 4
    assert kept["bits"] == {"embedding": 16, "weight": 8, "activation": 8, "lm_head": 4}
    assert kept["ignore"] == ["k_proj", "v_proj"]
    assert kept["calibration"] == {"source": str(text), "sequences": 2, "length": 32}
    assert kept["search"]["rounds"] == 1
    assert kept["search"]["propagation"] == "parallel"
    layers = {layer["name"]: layer for layer in of_json(llm_fp4("inspect", out, "--json"))["layers"]}
    assert layers["model.layers.0.mlp.down_proj"]["weight"] == ["e4m3"]
    assert layers["lm_head"]["weight"] == ["e2m1"]
    assert layers["model.layers.0.self_attn.k_proj"]["weight"] == []
    assert layers["model.embed_tokens"]["weight"] == []


def test_targets_leave_the_rest_in_float(llm_fp4: Any, source: Path, tmp_path: Path) -> None:
    told = of_json(llm_fp4("quantize", source, tmp_path / "out", "--targets", "re:.*layers\\.1\\.mlp.*", "--json", *QUICK))
    assert (told["layers"], told["float_layers"]) == (3, 13)


def test_eval_compares_with_the_reference(llm_fp4: Any, checkpoint: Path, source: Path, text: Path) -> None:
    arguments = ["--text", text, "--length", "64", "--windows", "3", "--quiet"]
    told = of_json(llm_fp4("eval", checkpoint, "--reference", source, "--json", *arguments))["text"]
    assert told["float"]["kl"] == 0
    assert told["float"]["top1"] == 1
    assert told["model"]["tokens"] == told["float"]["tokens"] == 3 * 63
    assert 0 < told["model"]["kl"] < math.inf
    assert told["gap"] == pytest.approx(math.log(told["model"]["perplexity"] / told["float"]["perplexity"]))
    shown = llm_fp4("eval", checkpoint, "--reference", source, *arguments).stdout
    assert f"{told['model']['kl']:.4g}" in shown


def test_eval_of_a_float_model_has_no_comparison(llm_fp4: Any, source: Path, tiny_llama: Any, text: Path) -> None:
    told = of_json(llm_fp4("eval", source, "--text", text, "--length", "64", "--windows", "2", "--json", "--quiet"))["text"]
    assert told["model"]["kl"] is None
    assert "float" not in told
    from transformers import AutoTokenizer

    ids = torch.tensor(AutoTokenizer.from_pretrained(source)(text.read_text()[:128])["input_ids"][:128]).view(2, 64)
    with torch.no_grad():
        loss = tiny_llama()(input_ids=ids, labels=ids).loss
    assert told["model"]["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)


def test_eval_answers_questions(llm_fp4: Any, checkpoint: Path, tmp_path: Path) -> None:
    questions = tmp_path / "quiz.jsonl"
    questions.write_text(
        "\n".join(json.dumps({"query": f"Is {i} even?", "choices": ["yes", "no"], "gold": i % 2}) for i in range(6))
    )
    told = of_json(llm_fp4("eval", checkpoint, "--zeroshot", questions, "--limit", "4", "--json", "--quiet"))
    assert told["zeroshot"]["quiz"]["n"] == 4
    assert told["zeroshot"]["quiz"]["acc"] in (0, 0.25, 0.5, 0.75, 1)
    assert "quiz" in llm_fp4("eval", checkpoint, "--zeroshot", questions, "--quiet").stdout


def test_generate_streams_what_json_tells(llm_fp4: Any, checkpoint: Path) -> None:
    arguments = ["generate", checkpoint, "The sea", "--max-new-tokens", "12", "--quiet"]
    told = of_json(llm_fp4(*arguments, "--json"))
    assert told["prompt"] == "The sea"
    assert told["text"]
    assert llm_fp4(*arguments).stdout.rstrip("\n") == told["text"].rstrip("\n")


def test_generate_samples_by_seed(llm_fp4: Any, source: Path) -> None:
    def text(seed: int, temperature: float) -> str:
        arguments = ["--max-new-tokens", "12", "--temperature", temperature, "--seed", seed, "--json", "--quiet"]
        return of_json(llm_fp4("generate", source, "The sea", *arguments))["text"]

    assert text(1, 2.0) == text(1, 2.0) != text(2, 2.0)
    assert text(1, 0.0) == text(2, 0.0)


def test_generate_in_the_chat_template(llm_fp4: Any, refused: Any, source: Path) -> None:
    assert "no chat template" in refused("generate", source, "Hello", "--chat", "--quiet")
    (source / "chat_template.jinja").write_text("{% for m in messages %}Q: {{ m.content }}\nA:{% endfor %}")
    plain, chat = (
        of_json(llm_fp4("generate", source, prompt, "--max-new-tokens", "8", "--json", "--quiet", *more))["text"]
        for prompt, more in (("Q: Hello\nA:", []), ("Hello", ["--chat"]))
    )
    assert plain == chat


def test_inspect_of_a_checkpoint(llm_fp4: Any, checkpoint: Path) -> None:
    told = of_json(llm_fp4("inspect", checkpoint, "--json"))
    assert told["quantized"] is True
    assert len(told["layers"]) == 16
    plan = json.loads((checkpoint / "plan.json").read_text())
    for layer in told["layers"]:
        if layer["site"]:
            site = plan["inputs"][layer["site"]]
            assert layer["name"] in site["operands"]
            assert layer["input"] == [site["format"]]
            assert layer["input_scale"] == site["scale"]
            assert sum(layer["shift_histogram"] or [layer["shape"][1]]) == layer["shape"][1]
    shown = llm_fp4("inspect", checkpoint).stdout
    assert all(layer["name"] in shown for layer in told["layers"])


def test_inspect_of_a_float_model_says_what_stays_float_and_why(llm_fp4: Any, source: Path) -> None:
    told = of_json(llm_fp4("inspect", source, "--bits", "16/4/8", "--ignore", "lm_head", "--json", "--quiet"))
    assert told["quantized"] is False
    layers = {layer["name"]: layer for layer in told["layers"]}
    assert layers["model.layers.0.mlp.up_proj"]["weight"] == ["e1m2", "e2m1", "e3m0"]
    assert layers["model.layers.0.mlp.up_proj"]["input"] == ["e1m6", "e2m5", "e3m4", "e4m3", "e5m2"]
    assert "'lm_head'" in layers["lm_head"]["reason"]
    assert "16 bits" in layers["model.embed_tokens"]["reason"]
    assert (
        "14 layers to quantize, 2 stay float"
        in llm_fp4("inspect", source, "--bits", "16/4/8", "--ignore", "lm_head", "--quiet").stdout
    )


def test_inspect_measures_and_draws_activations(llm_fp4: Any, source: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figures = tmp_path / "figures"
    told = of_json(
        llm_fp4("inspect", source, "--activations", "--figures", figures, "--sequences", "2", "--length", "32", "--json", "--quiet")
    )
    sites = told["activations"]
    assert [len(s["operands"]) for s in sites] == [3, 1, 2, 1] * 2 + [1]
    assert all(s["tokens"] == 64 for s in sites)
    assert [len(s["channel_absmax"]) for s in sites] == [32, 32, 32, 64] * 2 + [32]
    assert sorted(p.name for p in figures.iterdir()) == [
        "lm_head.png",
        "model-layers-000.png",
        "model-layers-001.png",
        "variance.png",
    ]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in figures.iterdir())
    assert "var. between" in llm_fp4("inspect", source, "--activations", "--sequences", "2", "--length", "32", "--quiet").stdout


def test_recipes(llm_fp4: Any, refused: Any, tmp_path: Path) -> None:
    from llm_fp4.recipe import PRESETS, load_recipe

    assert set(of_json(llm_fp4("recipes", "--json"))["recipes"]) == set(PRESETS)
    assert all(name in llm_fp4("recipes").stdout for name in PRESETS)
    path = tmp_path / "r.yaml"
    path.write_text(llm_fp4("recipes", "minmax-int").stdout)
    assert load_recipe(str(path)) == load_recipe("minmax-int")
    assert of_json(llm_fp4("recipes", "fpq", "--json"))["method"] == "fpq"
    assert "no recipe 'nothing'" in refused("recipes", "nothing", code=2)


TASK = """
task: odd_questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}]
"""


@pytest.mark.filterwarnings("ignore")
def test_figures_go_into_the_model_card(
    llm_fp4: Any, checkpoint: Path, text: Path, tmp_path: Path, refused: Any, source: Path
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is optional")
    data, folder = tmp_path / "items.jsonl", tmp_path / "tasks"
    folder.mkdir()
    items = [{"query": f"How odd is {i}?", "choices": ["odd", "even"], "gold": i % 2} for i in range(6)]
    data.write_text("\n".join(map(json.dumps, items)))
    (folder / "odd.yaml").write_text(TASK.format(data=data, cache=tmp_path / "cache"))
    before = (checkpoint / "README.md").read_text()
    assert "Nothing was measured yet" in before
    measured = ["--length", "32", "--windows", "4", "--card", "--quiet", "--json"]
    result = llm_fp4("eval", checkpoint, "--text", text, "--tasks", "odd_questions", "--include-path", folder, *measured)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    card = (checkpoint / "README.md").read_text()
    perplexity = f"| text.txt, windows of 32 tokens | perplexity | {said['text']['model']['perplexity']:.4g} |"
    assert perplexity in card
    assert f"| odd_questions | acc | {said['tasks']['odd_questions']['acc']:.4g} |" in card
    assert card.split("<!--")[0] == before.split("<!--")[0]
    result = llm_fp4("eval", checkpoint, "--text", text, "--reference", source, *measured)
    assert result.exit_code == 0, result.output
    again = (checkpoint / "README.md").read_text()
    assert again.count("| perplexity |") == 1
    assert "| odd_questions | acc |" in again
    assert "KL to the float model" in again
    assert "is not quantized" in refused("eval", source, "--text", text, "--card", "--quiet")


def test_contexts_go_into_the_model_card(llm_fp4: Any, checkpoint: Path, text: Path) -> None:
    result = llm_fp4("eval", checkpoint, "--text", text, "--context", "16,32", "--card", "--quiet", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["context"]["16"]["model"]["perplexity"]
    assert f"| text.txt, context of 16 tokens | perplexity | {found:.4g} |" in (checkpoint / "README.md").read_text()


def test_what_was_measured_is_told_where_a_later_part_fails(llm_fp4: Any, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{}\n")
    result = llm_fp4(
        "eval",
        checkpoint,
        "--text",
        text,
        "--length",
        "32",
        "--windows",
        "2",
        "--zeroshot",
        tmp_path / "bad.jsonl",
        "--quiet",
        "--json",
    )
    assert result.exit_code == 1
    assert "bad.jsonl" in result.stderr
    assert json.loads(result.stdout)["text"]["model"]["tokens"] > 0


def test_inspect_says_what_a_checkpoint_was_made_from(llm_fp4: Any, checkpoint: Path) -> None:
    made = json.loads((checkpoint / "config.json").read_text())["quantization_config"]["fingerprint"]
    shown = llm_fp4("inspect", checkpoint).stdout
    assert f"source {made['source']['sha256'][:12]}, recipe {made['recipe']['sha256'][:12]}" in shown
    assert f"torch {made['versions']['torch']}" in shown
    assert json.loads(llm_fp4("inspect", checkpoint, "--json").stdout)["fingerprint"] == made
