"""ONNX: the whole model, with 4-bit weights that stay packed.

E1M2 goes into ``MatMulNBits``, ONNX Runtime's 4-bit product; E2M1 into FLOAT4E2M1 initializers under ``DequantizeLinear``
with a scale for every row (opset 23), which ONNX's reference evaluator runs and ONNX Runtime's CPU does not yet; other
grids of at most 127 steps into INT8 under ``DequantizeLinear``. Needs ``onnx`` and ``onnxscript``.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from llm_fp4.checkpoint import Manifest, ModuleEntry
from llm_fp4.errors import UnsupportedError
from llm_fp4.export.graph import TextGraph
from llm_fp4.export.holding import Holding, hold_weights
from llm_fp4.export.weights import PackedWeights
from llm_fp4.numerics import QuantizedTensor, decode, pack, parse
from llm_fp4.storage import output_error

WHOLE_MODEL = True  # write() takes the loaded model
FILE = "model.onnx"
OPSET = 23  # the first with FLOAT4E2M1
BLOCK = 32  # values that share a scale in MatMulNBits; here each row's scale is repeated
_E2M1, _E1M2 = parse("e2m1"), parse("e1m2")


def _container(entry: ModuleEntry) -> str | None:
    if entry.blocks is not None:
        return None
    if entry.format == _E2M1 and entry.shape[1] % 2 == 0:
        return "FLOAT4E2M1"
    if entry.format == _E1M2 and entry.kind == "linear":
        return "MatMulNBits"
    if entry.format == _E1M2 and entry.shape[1] % 2 == 0:
        return "INT4"
    return "INT8" if entry.format.max_level <= 127 else None


def hold(manifest: Manifest, weights: PackedWeights) -> Holding:
    """Return what ONNX holds.

    Raises:
        UnsupportedError: formats whose levels exceed 8-bit integers, or smoothed inputs.
    """
    holding = hold_weights(
        manifest,
        "onnx",
        {n: _container(e) for n, e in manifest.items()},
        "quantize them to 4 bits with a scale a row, or leave them in float (--ignore)",
        new_biases=True,
    )
    if "FLOAT4E2M1" in holding.containers.values():
        holding.notes.append(
            "ONNX Runtime's CPU has no kernel for FLOAT4E2M1 (1.32); run it with onnx.reference or another runtime, or "
            "quantize with the weight format e1m2, which ONNX Runtime runs"
        )
    return holding


def write(model: Any, weights: PackedWeights, out: Path) -> None:
    """Write ``model.onnx`` and its data file into ``out``.

    Args:
        model: the loaded checkpoint, float32; its quantized modules are replaced.
    Raises:
        UnsupportedError: onnxscript is not installed, or the exporter cannot convert this model.
        OutputError: the directory cannot be written.
    """
    if find_spec("onnxscript") is None or find_spec("onnx_ir") is None:  # torch's exporter needs the first and says less
        raise UnsupportedError("exporting to onnx needs onnxscript; install it: pip install 'llm-fp4[onnx]'")
    import onnx_ir

    graph = TextGraph(model).eval()
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    axes = {0: batch, 1: tokens}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                graph, graph.example(), dynamo=True, input_names=list(graph.inputs), output_names=[graph.output],
                dynamic_shapes=(axes, axes), opset_version=OPSET, optimize=False, verbose=False,
            )  # fmt: skip
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedError(f"torch.onnx cannot export {type(model).__name__}: {reason}") from error
    assert program is not None
    converted = program.model
    _exchange(converted, weights)
    for thing in (converted, converted.graph, *converted.graph):  # traces of this machine's files, many times the graph's size
        thing.metadata_props.clear()
    try:
        onnx_ir.save(converted, out / FILE, external_data=f"{FILE}.data")
    except OSError as error:
        raise output_error(error, out / FILE) from None


def _exchange(converted: Any, weights: PackedWeights) -> None:
    """Put packed initializers in the place of the twin's float weights.

    Raises:
        UnsupportedError: a weight that the exported graph does not show, so that it would stay in float.
    """
    graph = converted.graph
    wanted = {f"model.{name}.weight": name for name in weights.manifest}
    done = set()
    for initializer, name in wanted.items():
        value = graph.initializers.get(initializer)
        if value is None:
            continue
        done.add(weights.owner(name))
        weight = weights[name]
        for consumer, index in list(value.uses()):
            product = _transposed_product(consumer)
            if weight.format == _E1M2 and product is not None:
                _product(graph, product, weight, initializer)
            else:
                consumer.replace_input_with(index, _dequantized(graph, weight, initializer))
        for consumer, _ in list(value.uses()):  # transposes that nothing reads any more
            graph.remove(consumer, safe=True)
        del graph.initializers[initializer]
    if lost := sorted({weights.owner(n) for n in weights.manifest} - done):
        raise UnsupportedError(f"torch.onnx folded the weight of {lost[0]} away while exporting, so it cannot be stored in 4 bits")
    converted.opset_imports["com.microsoft"] = 1


def _transposed_product(consumer: Any) -> Any:
    """Return the MatMul that reads ``consumer``, a Transpose, and nothing else does; or None."""
    if consumer.op_type != "Transpose":
        return None
    uses = list(consumer.outputs[0].uses())
    return uses[0][0] if len(uses) == 1 and uses[0][0].op_type == "MatMul" and uses[0][1] == 1 else None


def _constant(graph: Any, name: str, array: Any, dtype: Any = None, shape: tuple[int, ...] | None = None) -> Any:
    """Return the initializer ``name``, made once; ``dtype`` with ``shape`` marks packed nibbles."""
    import onnx_ir as ir

    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.Tensor(array, name=name) if dtype is None else ir.PackedTensor(array, dtype, shape=shape, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def nbits_blocks(weight: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """Return an E1M2 weight as ``MatMulNBits`` wants it.

    Returns:
        packed: (rows, blocks, BLOCK / 2) uint8, nibbles of ``level + 8``, low nibble the even column; padding is level 0.
        scale: (rows, blocks) float32, each row's scale repeated.
    """
    level = decode(weight.codes, weight.format).to(torch.int16)
    level = pad(level, (0, -level.shape[1] % BLOCK))
    packed = pack((level + 8).to(torch.uint8), 4).reshape(len(level), -1, BLOCK // 2)
    return packed, weight.scale.reshape(-1, 1).expand(-1, packed.shape[1])


def _product(graph: Any, product: Any, weight: QuantizedTensor, name: str) -> None:
    """Replace a MatMul by MatMulNBits."""
    import onnx_ir as ir

    packed, scale = nbits_blocks(weight)
    b = _constant(graph, f"{name}.nbits", packed.contiguous().numpy())
    s = _constant(graph, f"{name}.nbits_scale", scale.contiguous().numpy())
    rows, columns = weight.shape
    node = ir.node(
        "MatMulNBits", [product.inputs[0], b, s], {"K": columns, "N": rows, "bits": 4, "block_size": BLOCK}, domain="com.microsoft"
    )
    result = product.outputs[0]
    node.outputs[0].shape, node.outputs[0].type = result.shape, result.type
    graph.insert_before(product, node)
    ir.convenience.replace_all_uses_with(result, node.outputs[0], replace_graph_outputs=True)
    node.outputs[0].name, result.name = result.name, None
    graph.remove(product, safe=True)


def _dequantized(graph: Any, weight: QuantizedTensor, name: str) -> Any:
    """Return the output of a DequantizeLinear of the weight, made once and ahead of every reader."""
    import onnx_ir as ir

    made = f"{name}.dequantized"
    for node in graph:
        if node.outputs and node.outputs[0].name == made:
            return node.outputs[0]
    scale, level = weight.scale, decode(weight.codes, weight.format).to(torch.int8)
    if weight.format == _E2M1 and weight.shape[1] % 2 == 0:
        # the OCP grid 0 0.5 1 ... 6 is half of ours, and doubling a scale is exact
        packed, scale = _constant(graph, f"{name}.codes", weight.packed.numpy(), ir.DataType.FLOAT4E2M1, weight.shape), scale * 2
    elif weight.format == _E1M2 and weight.shape[1] % 2 == 0:
        packed = _constant(graph, f"{name}.codes", pack((level & 0xF).to(torch.uint8), 4).numpy(), ir.DataType.INT4, weight.shape)
    else:
        packed = _constant(graph, f"{name}.codes", level.numpy())
    node = ir.node("DequantizeLinear", [packed, _constant(graph, f"{name}.scale", scale.contiguous().numpy())], {"axis": 0})
    node.outputs[0].name, node.outputs[0].shape = made, ir.Shape(weight.shape)
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph.insert_before(graph[0], node)
    return node.outputs[0]
