"""The units of a run: what each quantizes, from what, and what it leaves in the store; one file a kind."""

from llm_fp4.pipeline.units.block import block_unit
from llm_fp4.pipeline.units.embeddings import embeddings_unit
from llm_fp4.pipeline.units.outer import tail_unit

__all__ = ["block_unit", "embeddings_unit", "tail_unit"]
