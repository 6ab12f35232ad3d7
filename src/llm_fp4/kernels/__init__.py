"""Operations of quantized layers: schemas and reference bodies in ``ops``, faster ones loaded when present."""

from llm_fp4.kernels import cpu, cpu_blocks, cpu_fused, cuda
from llm_fp4.kernels.blocks import block_linear, quantize_blocks, quantized_block_linear
from llm_fp4.kernels.fused import quantized_linear
from llm_fp4.kernels.hadamard import hadamard
from llm_fp4.kernels.kronecker import kronecker, split_width
from llm_fp4.kernels.norm import norm_quantize_input
from llm_fp4.kernels.ops import accumulate, float_linear, int_linear, integer_product, quantize_input, token_scale

OVERRIDES = (cpu, cpu_blocks, cpu_fused, cuda)  # importing them registers what they hold

__all__ = [
    "accumulate", "block_linear", "float_linear", "hadamard", "int_linear", "integer_product", "kronecker", "norm_quantize_input",
    "quantize_blocks", "quantize_input", "quantized_block_linear", "quantized_linear", "split_width", "token_scale",
]  # fmt: skip
