"""Fake quantization of an input: the values that the integer path stands for, used by search and the float path."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_fp4.kernels.blocks import quantize_blocks
from llm_fp4.kernels.ops import input_multiplier, quantize_input, token_scale
from llm_fp4.numerics import round_to_level
from llm_fp4.plan import InputSpec


def fake_quantize_input(x: Tensor, spec: InputSpec, scale: Tensor, shift: Tensor | None, smooth: Tensor | None) -> Tensor:
    """Return (tokens, in) float32 ``x`` rounded as a quantized layer rounds it.

    Args:
        scale: () float32, the static step of the least shifted channel, the clipping ratio of a per-token scale, or the
            scale over the scales of blocks.
        shift: (in,) uint8 or None. smooth: (in,) float32 or None; the result is divided by it, as the stored
            weights are multiplied by it.
    """
    x = x.float()
    if blocks := spec.blocks:
        f = spec.format
        values: Tensor = quantize_blocks(x, scale, blocks.block_size, blocks.scale_dtype, f.exponent_bits, f.mantissa_bits)
        return values
    f, per_token = spec.format, spec.granularity == "per_token"
    if x.is_cpu and spec.limbs and not (torch.is_grad_enabled() and x.requires_grad):
        # the same values: a power of two moves from the step to the level
        rule = (f.exponent_bits, f.mantissa_bits, f.signed, spec.max_shift, per_token)
        levels, least = quantize_input(x, scale, shift, smooth, *rule)
        rounded: Tensor = levels.to(torch.float32).mul_(least)
        return rounded
    step = token_scale(x, scale, shift, smooth, spec.format.max_level) if per_token else scale
    level = round_to_level(x * input_multiplier(step, shift, smooth), spec.format)
    return level.mul_(step if shift is None else step * torch.exp2(-shift.float()))


def beyond(x: Tensor, spec: InputSpec, scale: Tensor, shift: Tensor | None, smooth: Tensor | None) -> Tensor:
    """Return (tokens, in) bool: the values of ``x`` beyond the largest that its static scale reaches; they are clipped.

    Args: as :func:`fake_quantize_input`'s, of a spec with one static scale.
    """
    return (x.float() * input_multiplier(scale, shift, smooth)).abs() > float(spec.format.max_level)
