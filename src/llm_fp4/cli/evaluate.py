"""``llm-fp4 eval``: perplexity, distance to the float model, zero-shot accuracy, images, labelled sentences and speech."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from llm_fp4.cli import options
from llm_fp4.cli.figures import show
from llm_fp4.cli.render import print_json
from llm_fp4.cli.working import working
from llm_fp4.errors import CalibrationError


def evaluate(
    path: Annotated[
        str, typer.Argument(metavar="DIR", help="A checkpoint of llm-fp4, or a float model: directory, hub name or .gguf file.")
    ],
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            "-t",
            metavar="FILE",
            show_default=False,
            help="Text for perplexity: .txt, .jsonl, .json.gz, .parquet or a hub data set.",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option("--reference", metavar="SRC", show_default=False, help="The float model, for KL divergence and agreement."),
    ] = None,
    length: Annotated[int, typer.Option("--length", min=2, metavar="N", help="Tokens in a window.")] = 512,
    windows: Annotated[
        int | None,
        typer.Option("--windows", min=1, metavar="N", show_default=False, help="At most this many windows.  [default: all]"),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            "--context",
            metavar="N,N",
            show_default=False,
            help="Perplexity at these lengths of context, on the same text: 512,2048,8192; --windows counts the longest.  [default: --length]",
        ),
    ] = None,
    chunk: Annotated[
        int | None,
        typer.Option(
            "--chunk",
            min=1,
            metavar="N",
            show_default=False,
            help="Run a window in pieces of N tokens through the cache.  [default: whole; 512 with --context; a cache in codes: its float window]",
        ),
    ] = None,
    zeroshot: Annotated[
        list[str] | None,
        typer.Option(
            "--zeroshot",
            metavar="FILE.jsonl",
            show_default=False,
            help="Questions, each an object with query, choices and gold; may be repeated.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="NAME,NAME",
            show_default=False,
            help="Tasks of lm-eval, by name; paper: the six of LLM-FP4 (extra: evaluation).",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, metavar="N", show_default=False, help="Questions of each file or task.  [default: all]"),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option("--images", metavar="FOLDER", show_default=False, help="Images for top-1 and top-5; needs --labels."),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option("--labels", metavar="FILE", show_default=False, help=".tsv or .csv: the image's file name, its class number."),
    ] = None,
    table: Annotated[
        str | None,
        typer.Option(
            "--table",
            metavar="FILE",
            show_default=False,
            help=".tsv or .csv of sentences and labels, as GLUE: accuracy, F1, Matthews, Spearman.",
        ),
    ] = None,
    audio: Annotated[
        str | None,
        typer.Option("--audio", metavar="FOLDER", show_default=False, help="Speech for the word error rate; needs --transcripts."),
    ] = None,
    transcripts: Annotated[
        str | None, typer.Option("--transcripts", metavar="FILE", show_default=False, help="Lines of file name, tab, text.")
    ] = None,
    include_path: Annotated[
        str | None,
        typer.Option(
            "--include-path",
            metavar="FOLDER",
            show_default=False,
            help="Task files (YAML) for --tasks, instead of lm-eval's own; local data.",
        ),
    ] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Also write the figures into the checkpoint's model card, README.md.")
    ] = False,
    device: options.Device = "cpu",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure the model DIR on text, questions, images, labelled sentences or speech; all in float32.

    \b
    Examples:
      llm-fp4 eval smollm-fp4 --text wiki.txt --reference HuggingFaceTB/SmolLM2-135M-Instruct
      llm-fp4 eval smollm-fp4 --text wiki.txt --windows 16 --json
      llm-fp4 eval smollm-fp4 --tasks paper --card
      llm-fp4 eval smollm-fp4 --text wiki.txt --context 512,2048,8192
      llm-fp4 eval smollm-fp4 --zeroshot arc_easy.jsonl --zeroshot piqa.jsonl
      llm-fp4 eval vit-fp4 --images val --labels labels.tsv --reference ./vit
      llm-fp4 eval minilm-fp4 --table stsb/dev.csv
    """
    if not any((text, zeroshot, tasks, images, table, audio)):
        raise typer.BadParameter("name something to measure on: --text, --zeroshot, --tasks, --images, --table or --audio")
    if (images is None) != (labels is None) or (audio is None) != (transcripts is None):
        raise typer.BadParameter("--images needs --labels, and --audio needs --transcripts")
    if text is None and images is None and reference is not None:
        raise typer.BadParameter("--reference compares predictions on a text or on images; add --text or --images")
    if include_path is not None and not tasks:
        raise typer.BadParameter("--include-path says where tasks are; name them with --tasks")
    lengths = _lengths(context, text)
    from llm_fp4.calibration import documents

    if text is not None:
        documents(text, "--text")  # what is missing is told before a model is loaded for it
    files = {"--images": images, "--labels": labels, "--audio": audio, "--transcripts": transcripts, "--table": table}
    _check_present([*files.items(), *(("--zeroshot", file) for file in zeroshot or [])])
    from llm_fp4 import api
    from llm_fp4.evaluation import evaluate_tasks

    if card:
        api.check_card(Path(path))
    result: dict[str, Any] = {"path": path}
    warnings: list[str] = []
    try:
        with working(quiet) as progress:
            loaded = api.load_any(path, device=device, progress=progress)
            rules: dict[str, Any] = {"text": text, "chunk": chunk, "device": device, "progress": progress, "warn": warnings.append}
            if text is not None and lengths:
                flat = None if reference is None else api.load_any(reference, device=device, progress=progress)
                measured = api.evaluate_contexts(loaded, lengths, reference=flat, windows=windows or 1, **rules)
                result["context_file"] = text
                result["context"] = {
                    length: _with_gap({name: asdict(each) for name, each in metrics.items()})
                    for length, metrics in measured.items()
                }
            elif text is not None:
                metrics = api.evaluate(loaded, reference=reference, length=length, windows=windows, **rules)
                shown = _with_gap({name: asdict(each) for name, each in metrics.items()})
                result["text"] = {"file": text, "length": length, **shown}
            if zeroshot:
                answers = api.answer_questions(loaded, zeroshot, limit=limit, progress=progress)
                result["zeroshot"] = {name: asdict(each) for name, each in answers.items()}
            if tasks:
                if loaded.tokenizer is None:
                    raise CalibrationError(f"{path} has no tokenizer, which tasks need; save one beside the model")
                names = [t.strip() for t in tasks.split(",") if t.strip()]
                result["tasks"] = evaluate_tasks(loaded.model, loaded.tokenizer, names, limit, include_path)
            if images is not None and labels is not None:
                flat = None if reference is None else api.load_any(reference, device=device, progress=progress)
                judged = api.judge_images(loaded, images, labels, flat, limit)
                result["images"] = {name: asdict(each) for name, each in judged.items()}
            if table is not None:
                result["table"] = api.judge_table(loaded, table, limit)
            if audio is not None and transcripts is not None:
                result["audio"] = api.judge_speech(loaded, audio, transcripts, limit)
    finally:  # where a part fails, those before it are told all the same
        result |= {"warnings": warnings} if warnings else {}
        if len(result) > 1 and as_json:
            print_json(result)
        elif len(result) > 1:
            show(result, path)
    if card:
        api.add_figures(Path(path), api.card_rows(result))


def _check_present(files: Iterable[tuple[str, str | None]]) -> None:
    for option, file in files:
        if file is not None and not Path(file).exists():
            raise CalibrationError(f"{option} {file} does not exist; check the path")


def _lengths(context: str | None, text: str | None) -> list[int]:
    """Return the lengths of "512,2048"; none where the option is not given."""
    if context is None:
        return []
    if text is None:
        raise typer.BadParameter("--context measures perplexity; add --text")
    parts = [p.strip() for p in context.split(",")]
    if not all(p.isdigit() and int(p) >= 2 for p in parts):
        raise typer.BadParameter(f"--context {context!r} is no list of lengths; write 512,2048,8192, say")
    return sorted({int(p) for p in parts})


def _with_gap(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics and, with a reference, ln(perplexity / float perplexity)."""
    if "float" not in metrics:
        return metrics
    return metrics | {"gap": math.log(metrics["model"]["perplexity"] / metrics["float"]["perplexity"])}
