"""NVFP4 and MXFP4 of SmolLM2 by llm-compressor's GPTQ and by this package's recipes, on the same calibration tokens.

    pip install --no-deps llmcompressor compressed-tensors==0.19.0 'transformers>=5.15,<5.18' 'huggingface-hub>=1.5,<2' auto-round \\
        nvidia-ml-py loguru pillow requests tqdm && pip install httpx
    python benchmarks/beside_llm_compressor.py [--formats NVFP4 MXFP4] [--sequences 8]

Weights and inputs of all linears but the output head, in 4 bits. llm-compressor runs with its defaults; its model is measured as it leaves it, with
weights and inputs rounded in the forward pass. G = ln(perplexity / float perplexity) on the held-out windows of quality.py.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time

import torch
from common import WORK, record, smollm2, spread, texts
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import llm_fp4
from llm_fp4.evaluation import compare


def theirs(source: str, scheme: str, tokens: torch.Tensor) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    batches = DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens], batch_size=1)
    recipe = GPTQModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])
    oneshot(model=model, dataset=batches, recipe=recipe, num_calibration_samples=len(tokens), max_seq_length=tokens.shape[1])
    return model


def ours(source: str, scheme: str, tokens: torch.Tensor) -> PreTrainedModel:
    out = WORK / "llm-compressor-ours"
    for folder in (out, out.with_name(f"{out.name}.partial")):
        shutil.rmtree(folder, ignore_errors=True)
    recipe = llm_fp4.load_recipe(scheme.lower())
    once = recipe.search.model_copy(update={"rounds": 1})
    llm_fp4.quantize(source, out, recipe.model_copy(update={"search": once}), tokens=tokens)
    return llm_fp4.load(out)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--formats", nargs="+", default=["NVFP4", "MXFP4"])
    arguments.add_argument("--sequences", type=int, default=8)
    arguments.add_argument("--windows", type=int, default=16)
    a = arguments.parse_args()
    source = str(smollm2())
    calibration, held_out = texts(AutoTokenizer.from_pretrained(source))
    tokens, measured = spread(calibration, a.sequences), spread(held_out, a.windows)
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    rows = []
    for scheme in a.formats:
        for name, make in (("llm-compressor GPTQ", theirs), ("llm-fp4", ours)):
            start = time.perf_counter()
            model = make(source, scheme, tokens)
            seconds = time.perf_counter() - start
            result = compare(reference, {name: model}, measured)
            gap = math.log(result[name].perplexity / result["float"].perplexity)
            one = result[name]
            print(f"{scheme} {name:20s} ppl {one.perplexity:8.2f}  G {gap:6.3f}  KL {one.kl:6.3f}  {seconds:5.0f} s", flush=True)
            rows.append(
                {"format": scheme, "by": name, "perplexity": one.perplexity, "float": result["float"].perplexity, "G": gap,
                 "kl": one.kl, "top1": one.top1, "seconds": seconds, "sequences": len(tokens)}
            )  # fmt: skip
            record("llm-compressor", rows)


if __name__ == "__main__":
    main()
