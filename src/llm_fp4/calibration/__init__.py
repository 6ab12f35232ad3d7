"""Calibration: data to token windows, and the inputs of linears gathered while a module runs."""

from llm_fp4.calibration.collect import collect, inputs_of, shared_inputs, token_rows
from llm_fp4.calibration.products import attention_order, collect_product
from llm_fp4.calibration.self_text import write_text
from llm_fp4.calibration.sources import documents
from llm_fp4.calibration.tokens import draw_windows, load_tokens, token_stream

__all__ = [
    "attention_order", "collect", "collect_product", "documents", "draw_windows", "inputs_of", "load_tokens", "shared_inputs",
    "token_rows", "token_stream", "write_text",
]  # fmt: skip
