"""QuantLinear: a linear layer of packed weights whose input is quantized as it arrives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llm_fp4.kernels import (
    block_linear,
    float_linear,
    hadamard,
    int_linear,
    integer_product,
    kronecker,
    quantize_input,
    quantized_block_linear,
    quantized_linear,
)
from llm_fp4.kernels.simulate import fake_quantize_input
from llm_fp4.nn.kept import KeepsDtypes
from llm_fp4.nn.shared import InputSite
from llm_fp4.numerics import FloatFormat, PerBlock, PerRow, QuantizedTensor, packed_width, scale_bytes
from llm_fp4.plan import InputPlan, InputSpec

_FEW_ROWS = 8  # up to so many, rounding anew costs less than one more operation


class PackedModule(KeepsDtypes):
    """Holds ``weight_packed`` and ``weight_scale``; a change of dtype leaves packed codes and scales alone.

    ``weight_scale`` is (rows,) float32, or the stored scales of blocks, E4M3 ones with ``weight_global_scale`` () over them.
    """

    kept = ("weight_scale", "weight_global_scale", "input_scale", "input_smooth", "input_left", "input_right", "input_offset")
    weight_packed: Tensor
    weight_scale: Tensor
    weight_global_scale: Tensor | None

    def __init__(self, rows: int, columns: int, fmt: FloatFormat, device: Any = None, blocks: PerBlock | None = None) -> None:
        super().__init__()
        self.weight_format, self.rows, self.columns, self.blocks = fmt, rows, columns, blocks
        width = packed_width(columns, fmt.bits)
        self.register_buffer("weight_packed", torch.zeros(rows, width, dtype=torch.uint8, device=device))
        shape, dtype = (blocks.shape(rows, columns), blocks.torch_dtype) if blocks else ((rows,), torch.float32)
        self.register_buffer("weight_scale", torch.ones(shape, device=device).to(dtype))
        second = torch.ones((), dtype=torch.float32, device=device) if blocks and blocks.two_level else None
        self.register_buffer("weight_global_scale", second)

    @property
    def weight(self) -> Tensor:
        """(rows, columns) float values, decoded at every access, for model code that reads a layer's weight or its dtype."""
        return self.quantized.dequantize()

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight as a QuantizedTensor over this module's own buffers."""
        return QuantizedTensor(
            self.weight_packed, self.weight_scale, self.weight_format, self.blocks or PerRow(), (self.rows, self.columns),
            self.weight_global_scale,
        )  # fmt: skip


class QuantLinear(PackedModule):
    """``y = x W' + b`` on packed 4- to 8-bit weights.

    The input is rounded to levels (with the channel shift) and multiplied as integers where int8 limbs and int32
    sums hold the product exactly: every pair of 4-bit formats, the integer grids (E1Mm) of any width, E2M3 and E3M2
    inputs among the 6-bit formats. Under block scales on both sides integers are summed within a block, and blocks in float32.
    Other pairs (E4M3, E5M2, ...) multiply the decoded values in float32.
    Without an input spec the input stays as it is (weight-only).
    """

    bias: Tensor | None
    input_scale: Tensor
    input_shift: Tensor | None
    input_smooth: Tensor | None
    input_left: Tensor | None
    input_right: Tensor | None
    input_offset: Tensor | None
    folded = False  # whether the bias holds more than the float layer's: float32 then, whatever the model's type
    site: InputSite | None = None  # shared with the linears that read the same input

    def __init__(
        self, in_features: int, out_features: int, weight_format: FloatFormat, spec: InputSpec | None, bias: bool, device: Any = None,
        dtype: torch.dtype = torch.float32, blocks: PerBlock | None = None,
    ) -> None:  # fmt: skip
        super().__init__(out_features, in_features, weight_format, device, blocks)
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)
        if spec is not None:
            self.register_buffer("input_scale", torch.ones((), dtype=torch.float32, device=device))
        shift = torch.zeros(in_features, dtype=torch.uint8, device=device) if spec and spec.max_shift else None
        smooth = torch.ones(in_features, dtype=torch.float32, device=device) if spec and spec.smooth else None
        self.register_buffer("input_shift", shift)
        self.register_buffer("input_smooth", smooth)
        for name, size in zip(("input_left", "input_right"), (spec and spec.factors) or (0, 0), strict=True):
            self.register_buffer(name, torch.eye(size, dtype=torch.float32, device=device) if size else None)
        offset = torch.zeros(in_features, dtype=torch.float32, device=device) if spec and spec.offset else None
        self.register_buffer("input_offset", offset)

    @classmethod
    def from_plan(
        cls, weight: QuantizedTensor, plan: InputPlan | None, bias: Tensor | None, folded: Tensor | None = None
    ) -> QuantLinear:
        """Return the layer of a quantized weight under its site's plan.

        Args:
            bias: (out,) or None. folded: (out,) float32 that is added to it, see :class:`~llm_fp4.plan.SiteResult`; or None.
        """
        rows, columns = weight.shape
        blocks = weight.granularity if isinstance(weight.granularity, PerBlock) else None
        if folded is not None:
            bias = folded if bias is None else bias.detach().float() + folded
        layer = cls(columns, rows, weight.format, plan.spec if plan else None, bias is not None, "meta", blocks=blocks)
        layer.folded = folded is not None
        layer.weight_packed, layer.weight_scale = weight.packed, weight.scale
        layer.weight_global_scale = None if weight.second_scale is None else weight.second_scale.clone()
        if bias is not None:
            layer.bias = bias.detach()
        if plan is not None:
            # own copies: the operands of a site are stored apart, so that each layer can be read alone
            layer.input_scale = plan.scale.clone()
            layer.input_shift = None if plan.shift is None else plan.shift.clone()
            layer.input_smooth = None if plan.smooth is None else plan.smooth.clone()
            layer.input_left = None if plan.left is None else plan.left.clone()
            layer.input_right = None if plan.right is None else plan.right.clone()
            layer.input_offset = None if plan.offset is None else plan.offset.clone()
        return layer

    @property
    def exact(self) -> bool:
        """Whether the product runs on integers."""
        blocks = self.blocks or (self.spec and self.spec.blocks)
        return self.spec is not None and not blocks and integer_product(self.spec.top, self.weight_format)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        fmt, spec = self.weight_format, self.spec
        weight = (self.weight_packed, self.weight_scale)
        bias = None if self.bias is None else self.bias.float()
        if spec is not None and self.exact:
            out = self._integer_product(x, rows, spec, bias)
        elif spec is not None and spec.blocks and self.blocks:
            f, i, w = spec.format, spec.blocks, self.blocks
            out = quantized_block_linear(
                self._arriving(rows), self.input_scale, i.block_size, i.scale_dtype, f.exponent_bits, f.mantissa_bits,
                self.weight_packed, scale_bytes(self.weight_scale), self.weight_global_scale, bias, w.block_size, w.scale_dtype,
                fmt.exponent_bits, fmt.mantissa_bits, self.fused,
            )  # fmt: skip
        else:
            if spec is not None:
                rows = fake_quantize_input(self.transformed(rows), spec, self.input_scale, self.input_shift, self.input_smooth)
            if self.blocks is None:
                out = float_linear(rows, *weight, bias, fmt.exponent_bits, fmt.mantissa_bits)
            else:
                out = block_linear(
                    rows, self.weight_packed, scale_bytes(self.weight_scale), self.weight_global_scale, bias,
                    self.blocks.block_size, self.blocks.scale_dtype, fmt.exponent_bits, fmt.mantissa_bits,
                )  # fmt: skip
        result: Tensor = out.to(x.dtype).view(*x.shape[:-1], self.out_features)
        return result

    @property
    def fused(self) -> bool:
        """Whether the operation that rounds the input transforms it in the same pass."""
        return self.spec is not None and self.spec.transform == "hadamard" and self.input_offset is None

    def transformed(self, rows: Tensor) -> Tensor:
        """Return (tokens, in) rows as they are quantized: after the transform of the input and less its offset, if it has these."""
        if self.input_left is not None and self.input_right is not None:
            rows = kronecker(rows, self.input_left, self.input_right)
        elif self.spec is not None and self.spec.transform is not None:
            rows = hadamard(rows)
        return rows if self.input_offset is None else rows.float() - self.input_offset

    def _arriving(self, rows: Tensor) -> Tensor:
        """Return (tokens, in) rows as the operation that rounds them wants them."""
        return rows if self.fused else self.transformed(rows)

    def _integer_product(self, x: Tensor, rows: Tensor, spec: InputSpec, bias: Tensor | None) -> Tensor:
        f, w = spec.format, self.weight_format
        rounding = (
            self.input_scale, self.input_shift, self.input_smooth,
            f.exponent_bits, f.mantissa_bits, f.signed, spec.max_shift, spec.granularity == "per_token",
        )  # fmt: skip
        weight = (self.weight_packed, self.weight_scale, bias, w.exponent_bits, w.mantissa_bits)
        out: Tensor
        if self.site is None or len(rows) <= _FEW_ROWS:
            out = quantized_linear(self._arriving(rows), *rounding, *weight, self.fused)
        else:
            levels = self.site.levels(x, lambda: quantize_input(self._arriving(rows), *rounding, self.fused))
            out = int_linear(*levels, *weight)
        return out

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.site = None  # other numbers may follow than those that were alike
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        spec = f"{self.spec.format}, {self.spec.granularity}, shift<={self.spec.max_shift}" if self.spec else "float"
        weight = f"{self.weight_format}" + (f", {self.blocks.name}" if self.blocks else "")
        return f"in={self.in_features}, out={self.out_features}, weight={weight}, input={spec}"
