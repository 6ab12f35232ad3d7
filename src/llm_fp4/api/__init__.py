"""The library's calls: quantize a model on disk or in memory, load a checkpoint, measure it, look into it."""

from llm_fp4.api.activations import SiteActivations, activation_statistics
from llm_fp4.api.evaluating import answer_questions, evaluate
from llm_fp4.api.figures import draw_activations
from llm_fp4.api.generating import generate_text
from llm_fp4.api.inspecting import AttentionReport, Inspection, LayerReport, inspect_model
from llm_fp4.api.loading import Loaded, load, load_any
from llm_fp4.api.quantization import quantize, quantize_module

__all__ = [
    "AttentionReport", "Inspection", "LayerReport", "Loaded", "SiteActivations", "activation_statistics", "answer_questions", "draw_activations",
    "evaluate", "generate_text", "inspect_model", "load", "load_any", "quantize", "quantize_module",
]  # fmt: skip
