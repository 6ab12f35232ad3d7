"""The one loop: collect, search, quantize, replace and propagate, block by block."""

from llm_fp4.pipeline.bytes import checkpoint_bytes
from llm_fp4.pipeline.job import quantize_units
from llm_fp4.pipeline.tied import parts, shared_heads
from llm_fp4.pipeline.workspace import Workspace

__all__ = ["Workspace", "checkpoint_bytes", "parts", "quantize_units", "shared_heads"]
