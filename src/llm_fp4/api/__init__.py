"""The library's calls: quantize a model on disk or in memory, load a checkpoint, measure its quality and speed, look into it."""

from llm_fp4.api.activations import SiteActivations, activation_statistics
from llm_fp4.api.benchmarking import Benchmark, Machine, Speed, benchmark
from llm_fp4.api.card import add_figures, card_rows, check_card
from llm_fp4.api.estimating import Estimate, estimate
from llm_fp4.api.evaluating import answer_questions, evaluate, evaluate_contexts
from llm_fp4.api.exporting import Exported, export, hold
from llm_fp4.api.figures import draw_activations
from llm_fp4.api.fisher import gradient_memory
from llm_fp4.api.generating import generate_text
from llm_fp4.api.inspecting import inspect_model
from llm_fp4.api.judging import judge_images, judge_speech, judge_table
from llm_fp4.api.loading import Loaded, load, load_any
from llm_fp4.api.quantization import quantize, quantize_module
from llm_fp4.api.reports import AttentionReport, AverageBits, CacheReport, Inspection, LayerReport
from llm_fp4.doctor import Diagnosis, Finding, diagnose

__all__ = [
    "AttentionReport",
    "AverageBits",
    "Benchmark",
    "CacheReport",
    "Diagnosis",
    "Estimate",
    "Exported",
    "Finding",
    "Inspection",
    "LayerReport",
    "Loaded",
    "Machine",
    "SiteActivations",
    "Speed",
    "activation_statistics",
    "add_figures",
    "answer_questions",
    "benchmark",
    "card_rows",
    "check_card",
    "diagnose",
    "draw_activations",
    "estimate",
    "evaluate",
    "evaluate_contexts",
    "export",
    "generate_text",
    "gradient_memory",
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
