"""The library's calls: quantize a model on disk or in memory, load a checkpoint, measure it."""

from llm_fp4.api.loading import load
from llm_fp4.api.quantization import quantize, quantize_module

__all__ = ["load", "quantize", "quantize_module"]
