"""Data to calibrate on, and the statistics gathered from it."""

from llm_fp4.calibration.self_text import write_text
from llm_fp4.calibration.sources import documents
from llm_fp4.calibration.tokens import draw_windows, load_tokens, token_stream

__all__ = ["documents", "draw_windows", "load_tokens", "token_stream", "write_text"]
