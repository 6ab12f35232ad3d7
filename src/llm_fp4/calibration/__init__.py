"""Calibration: data to batches, and the inputs of linears gathered while a module runs."""

from llm_fp4.calibration.collect import collect, shared_inputs, token_rows

__all__ = ["collect", "shared_inputs", "token_rows"]
