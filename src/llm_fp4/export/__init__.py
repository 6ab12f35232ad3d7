"""Checkpoints in the formats of other engines: one file a target, which first says what it cannot hold."""

from llm_fp4.export.holding import Holding
from llm_fp4.export.weights import PackedWeights

# target → module; each has hold(manifest, weights) and write(model or folder, weights, out), see WHOLE_MODEL
TARGETS = {
    "openvino": "llm_fp4.export.openvino", "onnx": "llm_fp4.export.onnx",
    "compressed-tensors": "llm_fp4.export.compressed_tensors", "gguf": "llm_fp4.export.gguf",
    "humming": "llm_fp4.export.humming",
}  # fmt: skip

__all__ = ["TARGETS", "Holding", "PackedWeights"]
