"""Opening float models, finding what can be quantized in them, and running them block by block."""

from llm_fp4.models.caches import continued, kept_whole
from llm_fp4.models.experts import separate_experts
from llm_fp4.models.memory import only_new_garbage, settle, steady
from llm_fp4.models.runner import Batch, BlockRunner
from llm_fp4.models.sizes import check_sizes
from llm_fp4.models.skeleton import FloatModel, open_model, open_processor, open_tokenizer
from llm_fp4.models.source import InMemory, LazyFiles, WeightSource
from llm_fp4.models.structure import Structure, embedding_multiplier, find_stacks, find_structure, placed, set_module, weight_shapes

__all__ = [
    "Batch", "BlockRunner", "FloatModel", "InMemory", "LazyFiles", "Structure", "WeightSource",
    "check_sizes", "continued", "embedding_multiplier", "find_stacks", "find_structure", "kept_whole",
    "only_new_garbage", "open_model", "open_processor", "open_tokenizer", "placed", "separate_experts", "set_module", "settle", "steady",
    "weight_shapes",
]  # fmt: skip
