"""The library's calls: quantize a model on disk or in memory, load a checkpoint, measure it."""

from llm_fp4.api.load import load
from llm_fp4.api.quantize import quantize, quantize_module

__all__ = ["load", "quantize", "quantize_module"]
