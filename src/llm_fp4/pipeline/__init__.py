"""The one loop: collect, search, quantize, replace and propagate, block by block."""

from llm_fp4.pipeline.bytes import checkpoint_bytes
from llm_fp4.pipeline.job import Job
from llm_fp4.pipeline.tied import parts, shared_heads

__all__ = ["Job", "checkpoint_bytes", "parts", "shared_heads"]
