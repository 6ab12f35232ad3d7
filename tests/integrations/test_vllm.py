"""vLLM serves our checkpoints through the plugin: equal accumulators, equal predictions, refusals by name."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_fp4
from llm_fp4.recipe import Recipe

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-engines installs it in an environment of its own")

ENVIRONMENT = {
    **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip
PROMPT = list(range(3, 25))

# prints every token's log-probabilities, and whether each served part accumulates as our layer of the same name does
PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams

def accumulators(model):
    import torch, llm_fp4
    from llm_fp4.kernels import quantize_input
    from llm_fp4.kernels.ops import accumulate
    from llm_fp4.numerics import decode
    ours = llm_fp4.load(sys.argv[1], dtype=torch.float32)
    def integers(layer, x):
        spec, f = layer.spec, layer.spec.format
        levels, _ = quantize_input(x, layer.input_scale, layer.input_shift, layer.input_smooth, f.exponent_bits, f.mantissa_bits,
                                   f.signed, spec.max_shift, spec.granularity == "per_token")
        return accumulate(levels, decode(layer.quantized.codes, layer.weight_format).to(torch.int8))
    merged = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    equal = {}
    for name, layer in model.named_modules():
        parts = getattr(layer, "llm_fp4_parts", None)
        if parts is None or not parts[0].linear.exact:
            continue
        parent, _, last = name.rpartition(".")
        names = [f"{parent}.{n}" for n in merged[last]] if last in merged else [name]
        linears = [ours.get_submodule(n) for n in names]
        x = torch.randn(5, linears[0].in_features, generator=torch.Generator().manual_seed(1))
        served = torch.cat([integers(p.linear, x) for p in parts], -1)
        mine = torch.cat([integers(l, x) for l in linears], -1)
        equal[name] = [len(parts), bool(torch.equal(served[:, :mine.shape[1]], mine)), served.dtype == torch.int32]
    return equal

llm = LLM(sys.argv[1], dtype="float32", enforce_eager=sys.argv[2] == "eager", max_model_len=64, max_num_seqs=2, max_logprobs=300)
prompt = json.loads(sys.argv[3])
out = llm.generate([{"prompt_token_ids": prompt}], SamplingParams(max_tokens=4, temperature=0, prompt_logprobs=260), use_tqdm=False)[0]
rows = [[row[t].logprob for t in range(260)] for row in out.prompt_logprobs[1:]]
print("RESULT" + json.dumps([rows, list(out.outputs[0].token_ids), llm.apply_model(accumulators)[0]]))
"""


def served(folder: Path, mode: str = "eager") -> Any:
    """Return (log-probabilities, tokens, accumulators) of a checkpoint in vLLM."""
    program = [sys.executable, "-c", PROGRAM, str(folder), mode, json.dumps(PROMPT)]
    environment = {**ENVIRONMENT, "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    done = subprocess.run(program, capture_output=True, text=True, env=environment, check=False)
    assert "RESULT" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.partition("RESULT")[2])


@pytest.fixture
def checkpoint(tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> Callable[..., Path]:
    def make(recipe: dict[str, Any], **config: Any) -> Path:
        sizes = {"hidden_size": 128, "intermediate_size": 192, **config}  # heads of 32: the smallest vLLM's CPU attention takes
        tiny_llama(**sizes).save_pretrained(tmp_path / "float")
        tiny_tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        tiny_tokenizer.save_pretrained(tmp_path / "float")
        tokens = torch.randint(2, 258, (2, 32), generator=torch.Generator().manual_seed(0))
        wish = Recipe.model_validate({"search": {"rounds": 1}, **recipe})
        return llm_fp4.quantize(tmp_path / "float", tmp_path / "out", wish, tokens=tokens)

    return make


_BLOCKS = {"formats": ["e2m1"], "granularity": "per_block", "block_size": 16, "scale_dtype": "e4m3"}
CASES = {
    "tied head": ({}, {"tie_word_embeddings": True}),
    "operands of several formats, biases": (
        {
            "overrides": [
                {"targets": ["k_proj", "up_proj"], "weight_formats": ["e1m2"]},
                {"targets": ["q_proj"], "weight_formats": ["e2m1"]},
            ]
        },
        {"attention_bias": True, "mlp_bias": True},
    ),
    "scales per token, float head": ({"inputs": {"granularity": "per_token"}, "ignore": ["lm_head"]}, {}),
    "blocks of 16 under E4M3 scales": (
        {
            "weights": _BLOCKS,
            "inputs": {**_BLOCKS, "shift": False},
            "bits": {"embedding": 16, "weight": 4, "activation": 4, "lm_head": 16},
        },
        {"tie_word_embeddings": True},
    ),
    "weight-only, float blocks": ({"bits": {"embedding": 4, "weight": 4, "activation": 16}, "ignore": ["re:.*layers.0.*"]}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_predictions(case: str, checkpoint: Callable[..., Path]) -> None:
    recipe, config = CASES[case]
    folder = checkpoint(recipe, **config)
    rows, tokens, equal = served(folder)
    model = llm_fp4.load(folder, dtype=torch.float32)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        ours = model(ids).logits[0, :-1].log_softmax(-1)
    theirs = torch.tensor(rows)
    kl = (ours.exp() * (ours - theirs)).sum(-1)
    assert kl.abs().max() <= 1e-3
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
    assert tokens == model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=1)[0, len(PROMPT) :].tolist()
    assert bool(equal) == ("weight-only" not in case and "blocks of" not in case)
    for name, (parts, same, integers) in equal.items():
        assert same, name
        assert integers, name
        several = "several" in case and name.endswith(("qkv_proj", "gate_up_proj"))
        assert (parts > 1) == several or not several, name


def test_compiled_it_predicts_the_same(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint({}, tie_word_embeddings=True)
    rows, _, _ = served(folder, "compiled")
    with torch.no_grad():
        ours = llm_fp4.load(folder, dtype=torch.float32)(torch.tensor([PROMPT])).logits[0, :-1].log_softmax(-1)
    kl = (ours.exp() * (ours - torch.tensor(rows))).sum(-1)
    assert kl.abs().mean() <= 1e-3


def test_what_is_merged_must_be_treated_alike(checkpoint: Callable[..., Path]) -> None:
    done = start(checkpoint({"ignore": ["k_proj"]}))
    assert "vLLM merges" in done
    assert "k_proj is float and model.layers.0.self_attn.q_proj is not" in done


def test_a_missing_tensor_fails(checkpoint: Callable[..., Path]) -> None:
    from safetensors.torch import load_file, save_file

    folder = checkpoint({})
    shard = next(folder.glob("model-00002-*.safetensors"))
    tensors = load_file(shard)
    del tensors["model.layers.0.mlp.up_proj.input_scale"]
    save_file(tensors, shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(re.sub(r'\s*"model.layers.0.mlp.up_proj.input_scale": "[^"]*",', "", index.read_text()))
    assert "lacks the tensor model.layers.0.mlp.up_proj.input_scale" in start(folder)


def start(folder: Path) -> str:
    """Return what vLLM says when it does not start."""
    program = [sys.executable, "-c", PROGRAM, str(folder), "eager", json.dumps(PROMPT)]
    done = subprocess.run(program, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode != 0
    return done.stdout + done.stderr


@contextlib.contextmanager
def server(folder: Path, *options: str) -> Iterator[str]:
    """Yield the address of vLLM's server on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "tiny",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "64", *options,
    ]  # fmt: skip
    log = folder.parent / "server.log"
    with log.open("w") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env={**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    try:
        for _ in range(1200):  # a busy machine takes minutes to import it
            assert process.poll() is None, log.read_text()[-4000:]
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.5)
        else:
            pytest.fail(f"the server did not start: {log.read_text()[-4000:]}")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.mark.parametrize("ranks", [1, 2])
def test_completes_and_chats(ranks: int, checkpoint: Callable[..., Path]) -> None:
    from openai import OpenAI

    folder = checkpoint({"inputs": {"granularity": "per_token"}}, tie_word_embeddings=True)
    model = llm_fp4.load(folder, dtype=torch.float32)
    expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=4, do_sample=False, pad_token_id=1)[0, len(PROMPT) :].tolist()
    with server(folder, "--tensor-parallel-size", str(ranks)) as address:
        client = OpenAI(base_url=address, api_key="none")
        done = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=4, temperature=0, extra_body={"return_token_ids": True}
        )
        assert done.choices[0].token_ids == expected
        said = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=4, temperature=0
        )
        assert said.usage is not None
        assert said.usage.completion_tokens >= 1
