"""ONNX Runtime runs E1M2, ONNX's reference evaluator runs E2M1; weights are compared bit for bit as each reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_fp4.api import export

onnx = pytest.importorskip("onnx", reason="onnx is optional: pip install 'llm-fp4[onnx]'")
pytest.importorskip("onnxscript", reason="onnxscript is optional: pip install 'llm-fp4[onnx]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the exporter


def feed(prompts: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Any]:
    return {"input_ids": prompts[0].numpy(), "attention_mask": prompts[1].numpy()}


def products(model: Any) -> dict[str, torch.Tensor]:
    """Return the weight of every MatMulNBits as ONNX Runtime computes with it: its product with the identity."""
    import onnxruntime

    found = {}
    packed = {i.name: i for i in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        size = next(a.i for a in node.attribute if a.name == "K")
        one = onnx.helper.make_node(node.op_type, ["x", *node.input[1:]], ["y"], domain=node.domain)
        one.attribute.extend(node.attribute)
        kind = onnx.TensorProto.FLOAT
        graph = onnx.helper.make_graph(
            [one], "one", [onnx.helper.make_tensor_value_info("x", kind, [size, size])],
            [onnx.helper.make_tensor_value_info("y", kind, None)], [packed[n] for n in node.input[1:]],
        )  # fmt: skip
        alone = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
        session = onnxruntime.InferenceSession(alone.SerializeToString(), providers=["CPUExecutionProvider"])
        name = node.input[1].removeprefix("model.").removesuffix(".weight.nbits")
        found[name] = torch.from_numpy(session.run(None, {"x": torch.eye(size).numpy()})[0]).t()
    return found


def dequantized(model: Any) -> dict[str, torch.Tensor]:
    """Return every DequantizeLinear's weight as the reference evaluator computes it."""
    from onnx.reference import ReferenceEvaluator

    found = {}
    packed = {i.name: i for i in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":
            output = onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None)
            graph = onnx.helper.make_graph([node], "one", [], [output], [packed[n] for n in node.input])
            alone = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
            name = node.output[0].removeprefix("model.").removesuffix(".weight.dequantized")
            found[name] = torch.from_numpy(ReferenceEvaluator(alone).run(None, {})[0])
    return found


def test_e1m2_runs_in_onnx_runtime(
    quantized: Callable[..., Path], values: Any, weight_only: Any, prompts: Any, tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is optional: pip install 'llm-fp4[onnx]'")
    folder = quantized("e1m2", attention_bias=True, intermediate_size=80)  # 80 is no multiple of a block of 32
    made = export(folder, tmp_path / "out", "onnx")
    path = tmp_path / "out" / "model.onnx"
    onnx.checker.check_model(path)
    model, ours = onnx.load(path), values(folder)
    found = products(model) | dequantized(model)
    assert set(found) == set(ours)
    assert all(torch.equal(found[n], ours[n]) for n in ours)
    assert sorted(set(made.holding.containers.values())) == ["INT4", "MatMulNBits"]
    logits = torch.from_numpy(onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feed(prompts))[0])
    expected = weight_only(folder, *prompts)
    assert (logits - expected)[prompts[1].bool()].abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("name", "container"), [("e2m1", "FLOAT4E2M1"), ("e3m0", "INT8")])
def test_other_formats_run_in_the_reference_evaluator(
    name: str, container: str, quantized: Callable[..., Path], values: Any, weight_only: Any, prompts: Any, tmp_path: Path
) -> None:
    from onnx.reference import ReferenceEvaluator

    folder = quantized(name, tie_word_embeddings=True)
    made = export(folder, tmp_path / "out", "onnx")
    path = tmp_path / "out" / "model.onnx"
    onnx.checker.check_model(path)
    model, ours = onnx.load(path), values(folder)
    found = dequantized(model)
    assert set(ours) - set(found) == {"model.embed_tokens"}  # the head's, which it shares
    assert all(torch.equal(found[n], ours[n]) for n in found)
    assert set(made.holding.containers.values()) == {container}
    assert any("FLOAT4E2M1" in note for note in made.holding.notes) == (name == "e2m1")
    logits = torch.from_numpy(ReferenceEvaluator(str(path)).run(None, feed(prompts))[0])
    expected = weight_only(folder, *prompts)
    assert (logits - expected)[prompts[1].bool()].abs().max() < 1e-4 * expected.abs().max()
    assert str(Path(torch.__file__).parent) not in path.read_bytes().decode("latin-1")  # nothing of this machine's files
