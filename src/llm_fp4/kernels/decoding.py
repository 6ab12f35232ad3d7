"""A decoder's blocks for one token, run by the compiled kernels in a single call; csrc/decoder.h has the same structures."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from llm_fp4.kernels.compiled import selected
from llm_fp4.kernels.cpu_blocks import SCALE_TYPES, covered_blocks
from llm_fp4.numerics import FloatFormat, PerBlock, QuantizedTensor, scale_bytes
from llm_fp4.plan import LIMB, InputSpec


class Norm(Structure):
    """``weight`` null: no norm."""

    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("eps", c_double), ("centered", c_int64)]


class Operand(Structure):
    """One packed weight that reads a site; ``scale`` null where its blocks have scales."""

    _fields_ = [
        ("codes", c_void_p), ("scale", c_void_p), ("bias", c_void_p), ("out", c_int64), ("exponent_bits", c_int64),
        ("mantissa_bits", c_int64), ("block_scales", c_void_p), ("block_size", c_int64), ("scale_type", c_int64), ("second", c_void_p),
    ]  # fmt: skip


class Site(Structure):
    """An input and its ``count`` operands; ``scale`` null: it stays in float."""

    _fields_ = [
        ("columns", c_int64), ("scale", c_void_p), ("shift", c_void_p), ("smooth", c_void_p), ("exponent_bits", c_int64),
        ("mantissa_bits", c_int64), ("signed", c_int64), ("max_shift", c_int64), ("per_token", c_int64), ("hadamard", c_int64),
        ("count", c_int64),
        ("operands", POINTER(Operand)), ("block_size", c_int64), ("scale_type", c_int64),
    ]  # fmt: skip


class Block(Structure):
    """One block of a decoder, and its (kv_heads, capacity, head_dim) keys and values."""

    _fields_ = [
        ("before_attention", Norm), ("of_queries", Norm), ("of_keys", Norm), ("before_mlp", Norm), ("qkv", Site), ("output", Site),
        ("gate_up", Site), ("down", Site), ("heads", c_int64), ("kv_heads", c_int64), ("head_dim", c_int64),
        ("attention_scale", c_double), ("keys", c_void_p), ("values", c_void_p), ("capacity", c_int64),
    ]  # fmt: skip


class Pinned:
    """Makes structures over tensors and keeps those tensors: the addresses stay good as long as this object."""

    def __init__(self) -> None:
        self.tensors: list[Any] = []

    def address(self, tensor: Tensor | None, dtype: torch.dtype) -> int | None:
        """Return the address of ``tensor``, or of a dense CPU copy in ``dtype`` where it is none itself."""
        if tensor is None:
            return None
        dense = tensor.detach().to("cpu", dtype).contiguous()
        self.tensors.append(dense)
        return dense.data_ptr()

    def norm(self, weight: Tensor | None, bias: Tensor | None = None, eps: float = 0.0, centered: bool = False) -> Norm:
        """Return the norm of (in,) ``weight``; None for no norm."""
        return Norm(self.address(weight, torch.float32), self.address(bias, torch.float32), eps, int(centered))

    def operand(self, weight: QuantizedTensor, bias: Tensor | None) -> Operand:
        """Return one packed weight of (out, in) with a scale for each row, or one for each block of a kind that ``covers`` names."""
        codes, biases = self.address(weight.packed, torch.uint8), self.address(bias, torch.float32)
        f, blocks = weight.format, weight.granularity
        numbers = (biases, len(weight.packed), f.exponent_bits, f.mantissa_bits)
        if not isinstance(blocks, PerBlock):
            return Operand(codes, self.address(weight.scale, torch.float32), *numbers)
        scales, second = scale_bytes(weight.scale), self.address(weight.second_scale, torch.float32)
        kind = SCALE_TYPES.index(blocks.scale_dtype)
        return Operand(codes, None, *numbers, self.address(scales, scales.dtype), blocks.block_size, kind, second)

    def site(
        self, columns: int, spec: InputSpec | None, scale: Tensor | None, shift: Tensor | None, smooth: Tensor | None,
        operands: Sequence[Operand],
    ) -> Site:  # fmt: skip
        """Return an input and all that reads it; ``spec`` None leaves the input in float."""
        array = (Operand * len(operands))(*operands)
        self.tensors.append(array)
        if spec is None:
            return Site(columns, None, None, None, 0, 0, 0, 0, 0, 0, len(operands), array)
        f = spec.format
        return Site(
            columns, self.address(scale, torch.float32), self.address(shift, torch.uint8), self.address(smooth, torch.float32),
            f.exponent_bits, f.mantissa_bits, int(f.signed), spec.max_shift, int(spec.granularity == "per_token"),
            int(spec.transform == "hadamard"), len(operands), array, spec.blocks.block_size if spec.blocks else 0,
            SCALE_TYPES.index(spec.blocks.scale_dtype) if spec.blocks else 0,
        )  # fmt: skip


def _library() -> ctypes.CDLL:
    library = selected()
    if library is None:  # callers ask `available` first; the kernels may have been switched off since
        raise RuntimeError("the compiled kernels were switched off while a decoder that needs them was in use")
    return library


def _check(status: int) -> None:
    if status != 0:
        raise MemoryError("the CPU kernels found no working memory for one token")


def available() -> bool:
    """Return whether compiled kernels run."""
    return selected() is not None


def covers_blocks(fmt: FloatFormat, weight: PerBlock | None, spec: InputSpec | None) -> bool:
    """Return whether the kernels multiply weights with such block scales by inputs of ``spec``, float ones where it is None."""
    if weight is None or not covered_blocks(weight.block_size, weight.scale_dtype, spec is None) or fmt.bits != 4:
        return False
    source = None if spec is None else spec.blocks
    if spec is None:
        return True
    return source is not None and covered_blocks(source.block_size, source.scale_dtype) and spec.format.max_level <= LIMB


def run_blocks(blocks: ctypes.Array[Block], hidden: Tensor, cosine: Tensor, sine: Tensor, position: int) -> None:
    """Take the (in,) float32 ``hidden`` through ``blocks``, in place; keys and values are stored at ``position``.

    Args:
        cosine, sine: (rotary,) float32 of the position.
    """
    status = _library().llm_fp4_run_blocks(
        blocks, len(blocks), hidden.data_ptr(), cosine.data_ptr(), sine.data_ptr(), len(cosine), position, torch.get_num_threads()
    )
    _check(status)


def site_linear(norm: Norm, site: Site, x: Tensor, out: Tensor) -> None:
    """Write the outputs of all operands of the normalized (in,) float32 ``x`` into (sum of outs,) float32 ``out``."""
    status = _library().llm_fp4_site_linear(
        ctypes.byref(norm), ctypes.byref(site), x.data_ptr(), out.data_ptr(), torch.get_num_threads()
    )
    _check(status)
