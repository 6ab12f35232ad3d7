"""compressed-tensors decompresses what we wrote to our values, bit for bit; transformers loads and runs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_fp4
from llm_fp4.api import export
from llm_fp4.export.compressed_tensors import int32_words
from llm_fp4.storage import TensorFiles

pytestmark = pytest.mark.filterwarnings("ignore")  # of compressed-tensors and transformers
LIBRARY = "compressed-tensors is optional: pip install 'llm-fp4[compressed-tensors]'"
NVFP4 = {"granularity": "per_block", "block_size": 16, "scale_dtype": "e4m3"}
MXFP4 = {"granularity": "per_block", "block_size": 32, "scale_dtype": "e8m0"}
GROUPS = {"granularity": "per_block", "block_size": 32, "scale_dtype": "float16"}


def decompressed(folder: Path) -> dict[str, torch.Tensor]:
    """Return what compressed-tensors makes of every compressed module, by name."""
    import re

    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    files = TensorFiles(folder)
    modules = {n.rpartition(".")[0] for n in files.names() if n.endswith("weight_scale")}
    found = {}
    for group in config["config_groups"].values():
        scheme = QuantizationScheme.model_validate(group)
        compressor = BaseCompressor.get_value_from_registry(group["format"])
        for name in [m for m in modules if any(re.match(t.removeprefix("re:"), m) for t in group["targets"])]:
            state = {n.removeprefix(f"{name}."): files.get(n) for n in files.names() if n.startswith(f"{name}.weight")}
            found[name] = compressor.decompress(state, scheme)["weight"].float()
    return found


def in_float32(folder: Path) -> Any:
    """Return the model as transformers loads it, in float32, its inputs rounded by compressed-tensors where the scheme says so.

    The library decompresses FP4 to bfloat16, which holds these values exactly, and would multiply in it.
    """
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig

    dense = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=dense)
    torch.nn.Module.float(model)
    for name, module in AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.input_activations is not None:
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, m=module, s=scheme: (forward_quantize(m, args[0], "input", s.input_activations),)
            )
    return model.eval()


CASES = {
    "e1m2": ("e1m2", None, "pack-quantized"), "e2m1": ("e2m1", None, "float-quantized"), "e3m0": ("e3m0", None, "float-quantized"),
    "nvfp4": ("e2m1", NVFP4, "nvfp4-pack-quantized"), "mxfp4": ("e2m1", MXFP4, "mxfp4-pack-quantized"),
    "int4 groups": ("e1m2", GROUPS, "pack-quantized"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_weights_are_equal_bit_for_bit_and_load(
    case: str, quantized: Callable[..., Path], values: Any, weight_only: Any, prompts: Any, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors", reason=LIBRARY)
    formats, rules, container = CASES[case]
    folder = quantized(formats, "16/4/16", rules=rules)
    made = export(folder, tmp_path / "ct", "compressed-tensors")
    assert set(made.holding.containers.values()) == {container}
    assert made.holding.dropped == []
    found, ours = decompressed(tmp_path / "ct"), values(folder)
    assert set(found) == set(ours)
    for name in ours:
        assert torch.equal(found[name], ours[name]), name
    model = in_float32(tmp_path / "ct")
    ids, mask = prompts
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    expected = weight_only(folder, ids, mask)
    assert (logits - expected)[mask.bool()].abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize(("rules", "container"), [(NVFP4, "nvfp4"), (MXFP4, "mxfp4")])
def test_inputs_of_the_same_blocks_are_held(rules: Any, container: str, quantized: Callable[..., Path], tmp_path: Path) -> None:
    folder = quantized("e2m1", "16/4/4", rules=rules, inputs={**rules, "shift": False})
    made = export(folder, tmp_path / "ct", "compressed-tensors")
    assert made.holding.dropped == []
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert config["format"] == group["format"] == f"{container}-pack-quantized"
    assert group["input_activations"]["group_size"] == rules["block_size"]
    files, ours = TensorFiles(tmp_path / "ct"), TensorFiles(folder)
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(files.get(f"{name}.weight_packed"), ours.get(f"{name}.weight_packed"))
    if container == "nvfp4":  # divisors
        assert float(files.get(f"{name}.input_global_scale")) == 1 / float(ours.get(f"{name}.input_scale"))
        assert float(files.get(f"{name}.weight_global_scale")) == 1 / float(ours.get(f"{name}.weight_global_scale"))


@pytest.mark.parametrize("rules", [NVFP4, MXFP4])
def test_inputs_are_rounded_as_ours(rules: Any, quantized: Callable[..., Path], prompts: Any, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason=LIBRARY)
    folder = quantized("e2m1", "16/4/4", rules=rules, inputs={**rules, "shift": False})
    export(folder, tmp_path / "ct", "compressed-tensors")
    model = in_float32(tmp_path / "ct")
    ids, mask = prompts
    with torch.no_grad():
        ours, theirs = (
            m(input_ids=ids, attention_mask=mask).logits[mask.bool()].double().log_softmax(-1)
            for m in (llm_fp4.load(folder, dtype=torch.float32), model)
        )
    assert (ours.exp() * (ours - theirs)).sum(-1).mean() <= 1e-3
    assert (ours.argmax(-1) == theirs.argmax(-1)).double().mean() >= 0.99


def test_rows_of_several_formats_and_a_tied_head(quantized: Callable[..., Path], tmp_path: Path) -> None:
    folder = quantized(None, "4/4/4", method="fpq", tie_word_embeddings=True)
    made = export(folder, tmp_path / "ct", "compressed-tensors")
    assert made.holding.containers["model.embed_tokens"] == made.holding.containers["lm_head"] == "float32"
    assert "the input side of 15 layers" in made.holding.dropped[0]
    config = json.loads((tmp_path / "ct" / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert "lm_head" in config["quantization_config"]["ignore"]
    table = llm_fp4.load(folder).get_submodule("model.embed_tokens").quantized.dequantize()
    assert torch.equal(TensorFiles(tmp_path / "ct").get("model.embed_tokens.weight"), table)


def test_int32_words() -> None:
    level = torch.tensor([[-8.0, -7.0, 0.0, 1.0, 2.0, 3.0, 4.0, 7.0, 7.0]])
    assert int32_words(level).tolist() == [[0xFCBA9810 - 2**32, 0x8888888F - 2**32]]
