"""Pure functions on tensors: formats, rounding, granularity, packing. Imports torch only."""

from llm_fp4.numerics.block_scales import (
    block_step,
    max_scale,
    neighbour,
    scale_bytes,
    scale_values,
    second_scale,
    store_scale,
)
from llm_fp4.numerics.formats import FloatFormat, formats_of_width, levels, parse
from llm_fp4.numerics.granularity import (
    Granularity,
    PerBlock,
    PerChannel,
    PerRow,
    PerTensor,
    parse_granularity,
)
from llm_fp4.numerics.int8 import int8_product
from llm_fp4.numerics.packing import pack, packed_width, unpack
from llm_fp4.numerics.qtensor import QuantizedTensor, quantize_tensor, step_of
from llm_fp4.numerics.rounding import (
    SMALLEST_STEP,
    decode,
    encode,
    encode_levels,
    fake_quantize,
    require_finite,
    round_to_level,
    scale_of_max,
    soft_level,
)

__all__ = [
    "SMALLEST_STEP", "FloatFormat", "Granularity", "PerBlock", "PerChannel", "PerRow", "PerTensor", "QuantizedTensor", "block_step", "decode",
    "encode", "encode_levels", "fake_quantize", "formats_of_width", "int8_product", "levels", "max_scale", "neighbour", "pack", "packed_width",
    "parse", "parse_granularity", "quantize_tensor", "require_finite", "round_to_level", "scale_bytes", "scale_of_max",
    "scale_values", "second_scale", "soft_level", "step_of", "store_scale", "unpack",
]  # fmt: skip
