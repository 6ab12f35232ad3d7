"""OpenVINO opens what we wrote: the same weights bit for bit, compressed while it runs, the same logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_fp4.api import export

ov = pytest.importorskip("openvino", reason="openvino is optional: pip install 'llm-fp4[openvino]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # of tracing

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
CONTAINERS = {"e2m1": "f4e2m1", "e1m2": "i4", "e3m0": "i8"}


def decompressed(model: Any) -> dict[str, torch.Tensor]:
    """Return what OpenVINO itself makes of every decompression chain."""
    found = {}
    for node in model.get_ops():
        if node.get_type_name() == "Multiply" and node.get_friendly_name().endswith(".weight"):
            part = ov.compile_model(ov.Model([node.output(0)], []), "CPU", EXACT)
            name = node.get_friendly_name().removeprefix("self.model.").removesuffix(".weight")
            found[name] = torch.from_numpy(part({})[0].copy())
    return found


@pytest.mark.parametrize("name", CONTAINERS)
def test_weights_are_equal_bit_for_bit_and_run_compressed(
    name: str, quantized: Callable[..., Path], values: Any, weight_only: Any, prompts: Any, tmp_path: Path
) -> None:
    folder = quantized(name, attention_bias=True)
    made = export(folder, tmp_path / "ov", "openvino")
    assert set(made.holding.containers.values()) == {CONTAINERS[name]}
    assert "15 layers" in made.holding.dropped[0]
    core = ov.Core()
    model = core.read_model(tmp_path / "ov" / "openvino_model.xml")
    found, ours = decompressed(model), values(folder)
    assert set(found) == set(ours)
    assert all(torch.equal(found[n], ours[n]) for n in ours)
    compiled = core.compile_model(model, "CPU", EXACT)
    ids, mask = prompts
    logits = torch.from_numpy(compiled({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})["logits"])
    expected = weight_only(folder, ids, mask)
    assert (logits - expected)[mask.bool()].abs().max() < 1e-4 * expected.abs().max()
    products = [n for n in compiled.get_runtime_model().get_ops() if n.get_rt_info()["layerType"].astype(str) == "FullyConnected"]
    held = [n.input_value(1).get_node().get_rt_info()["outputPrecisions"].astype(str) for n in products]
    assert len(products) == 15
    assert held.count(CONTAINERS[name]) == 15


def test_a_tied_head_and_one_token(quantized: Callable[..., Path], weight_only: Any, tmp_path: Path) -> None:
    folder = quantized("e2m1", tie_word_embeddings=True)
    export(folder, tmp_path / "ov", "openvino")
    compiled = ov.compile_model(tmp_path / "ov" / "openvino_model.xml", "CPU", EXACT)
    ids = torch.tensor([[7]])
    logits = torch.from_numpy(compiled({"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()})["logits"])
    expected = weight_only(folder, ids, torch.ones_like(ids))
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    single = sum(p.stat().st_size for p in (tmp_path / "ov").glob("*.bin"))
    assert single < 60_000  # one copy of the shared 260 x 64 codes: 8,320 bytes
