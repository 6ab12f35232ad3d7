"""The library's calls: quantize a model on disk or in memory, load a checkpoint, measure its quality and speed, look into it."""

from llm_fp4.api.activations import SiteActivations, activation_statistics
from llm_fp4.api.benchmarking import Benchmark, Machine, Speed, benchmark
from llm_fp4.api.estimating import Estimate, estimate
from llm_fp4.api.evaluating import answer_questions, evaluate, evaluate_contexts
from llm_fp4.api.exporting import Exported, export, hold
from llm_fp4.api.figures import draw_activations
from llm_fp4.api.generating import generate_text
from llm_fp4.api.inspecting import AttentionReport, AverageBits, CacheReport, Inspection, LayerReport, inspect_model
from llm_fp4.api.judging import judge_images, judge_speech, judge_table
from llm_fp4.api.loading import Loaded, load, load_any
from llm_fp4.api.quantization import quantize, quantize_module

__all__ = [
    "AttentionReport",
    "AverageBits",
    "Benchmark",
    "CacheReport",
    "Estimate",
    "Exported",
    "Inspection",
    "LayerReport",
    "Loaded",
    "Machine",
    "SiteActivations",
    "Speed",
    "activation_statistics",
    "answer_questions",
    "benchmark",
    "draw_activations",
    "estimate",
    "evaluate",
    "evaluate_contexts",
    "export",
    "generate_text",
    "hold",
    "inspect_model",
    "judge_images",
    "judge_speech",
    "judge_table",
    "load",
    "load_any",
    "quantize",
    "quantize_module",
]  # fmt: skip
