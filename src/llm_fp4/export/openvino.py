"""OpenVINO IR: the whole model, with 4-bit weight constants that run compressed on CPU.

E2M1 goes into ``f4e2m1`` constants, E1M2 into ``i4``, other grids of at most 127 steps into ``i8``; each is followed by a
real scale for every output channel, ``float32``. Needs ``openvino``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llm_fp4.checkpoint import Manifest, ModuleEntry
from llm_fp4.errors import OutputError, UnsupportedError
from llm_fp4.export.graph import TextGraph
from llm_fp4.export.holding import Holding, hold_weights
from llm_fp4.export.weights import PackedWeights
from llm_fp4.numerics import QuantizedTensor, decode, pack, parse
from llm_fp4.storage import output_error

WHOLE_MODEL = True  # write() takes the loaded model
FILE = "openvino_model.xml"
_NIBBLES = {parse("e2m1"): "f4e2m1", parse("e1m2"): "i4"}


def _container(entry: ModuleEntry) -> str | None:
    if entry.blocks is not None:
        return None
    if entry.format in _NIBBLES and entry.shape[1] % 2 == 0:  # packed rows must end on a byte
        return _NIBBLES[entry.format]
    return "i8" if entry.format.max_level <= 127 else None


def hold(manifest: Manifest, weights: PackedWeights) -> Holding:
    """Return what the IR holds.

    Raises:
        UnsupportedError: formats whose levels exceed 8-bit integers, or smoothed inputs.
    """
    holding = hold_weights(
        manifest,
        "openvino",
        {n: _container(e) for n, e in manifest.items()},
        "quantize them to 4 bits with a scale a row, or leave them in float (--ignore)",
        new_biases=True,
    )
    holding.notes.append(
        "compile it with INFERENCE_PRECISION_HINT=f32 (and DYNAMIC_QUANTIZATION_GROUP_SIZE=0) to compute as exactly as here: "
        "the CPU plugin's defaults round activations to bfloat16 where the machine has it"
    )
    return holding


def write(model: Any, weights: PackedWeights, out: Path) -> None:
    """Write ``openvino_model.xml`` and ``.bin`` into ``out``.

    Args:
        model: the loaded checkpoint, float32; its quantized modules are replaced.
    Raises:
        UnsupportedError: openvino is not installed or cannot convert this model.
        OutputError: the directory cannot be written.
    """
    try:
        import openvino as ov
    except ImportError:
        raise UnsupportedError("exporting to openvino needs openvino; install it: pip install 'llm-fp4[openvino]'") from None
    graph = TextGraph(model).eval()
    try:
        converted = ov.convert_model(graph, example_input=dict(zip(graph.inputs, graph.example(), strict=True)))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedError(f"openvino cannot convert {type(model).__name__}: {reason}") from error
    converted.output(0).set_names({graph.output})
    _exchange(converted, weights)
    try:
        ov.save_model(converted, str(out / FILE), compress_to_fp16=False)
    except OSError as error:
        raise output_error(error, out / FILE) from None
    except RuntimeError as error:
        raise OutputError(f"{out / FILE} cannot be written: {str(error).splitlines()[0]}") from None


def _exchange(converted: Any, weights: PackedWeights) -> None:
    """Put packed constants and scales in the place of the twin's float weights.

    Raises:
        UnsupportedError: a weight that the converted graph does not show, so that it would stay in float.
    """
    wanted = {f"self.model.{name}.weight": name for name in weights.manifest}
    done = set()
    for node in converted.get_ordered_ops():
        name = wanted.get(node.get_friendly_name())
        if name is None or node.get_type_name() != "Constant":
            continue
        targets = node.output(0).get_target_inputs()
        done.add(weights.owner(name))
        for target in targets:  # each reader its own chain: the CPU keeps a constant packed where one matrix product reads it
            target.replace_source_output(
                _decompressed(weights[name], _container(weights.manifest[name]), node.get_friendly_name()).output(0)
            )
    if lost := sorted({weights.owner(n) for n in weights.manifest} - done):
        raise UnsupportedError(f"openvino folded the weight of {lost[0]} away while converting, so it cannot be stored in 4 bits")


def _decompressed(weight: QuantizedTensor, container: str | None, name: str) -> Any:
    import openvino as ov
    from openvino import opset13 as ops

    shape, scale, level = list(weight.shape), weight.scale.reshape(-1, 1), decode(weight.codes, weight.format).to(torch.int8)
    if container == "f4e2m1":
        # the OCP grid 0 0.5 1 ... 6 is half of ours, and doubling a scale is exact
        tensor, scale = ov.Tensor(weight.packed.contiguous().numpy(), shape, ov.Type.f4e2m1), scale * 2
    elif container == "i4":
        nibbles = pack((level & 0xF).to(torch.uint8), 4)  # two's complement, low nibble the even column
        tensor = ov.Tensor(nibbles.contiguous().numpy(), shape, ov.Type.i4)
    else:
        tensor = ov.Tensor(level.contiguous().numpy())
    owned = ov.Tensor(tensor.element_type, tensor.shape)  # `tensor` lies over memory that torch frees
    tensor.copy_to(owned)
    constant = ops.constant(owned)
    constant.set_friendly_name(f"{name}/packed")
    product = ops.multiply(ops.convert(constant, "f32"), ops.constant(scale.contiguous().numpy()))
    product.set_friendly_name(name)
    return product
