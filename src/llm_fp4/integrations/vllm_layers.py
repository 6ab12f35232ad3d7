"""What a served layer is made of: parameters that know whether they were loaded, and the products of merged operands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tp_group
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PerTensorScaleParameter,
)

from llm_fp4.checkpoint import ModuleEntry
from llm_fp4.kernels import int_linear, quantize_input
from llm_fp4.kernels.ops import token_scale
from llm_fp4.nn import QuantLinear
from llm_fp4.plan import InputSpec

WeightParameter = ModelWeightParameter
RowParameter = ChannelQuantScaleParameter
BlockParameter = GroupQuantScaleParameter


class InputParameter(PerTensorScaleParameter):
    """(operands, n): the input side of each merged operand; n is 1 or the input channels, split with the input."""

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        width = self.data.shape[1]
        whole = loaded_weight.reshape(-1)
        self.data[0].copy_(whole if len(whole) == width else whole.narrow(0, self.tp_rank * width, width))

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        self.data[0].copy_(loaded_weight.reshape(-1))

    def _load_into_shard_id(self, loaded_weight: Tensor, shard_id: str | int, **kwargs: Any) -> None:
        self.data[self._shard_id_as_int(shard_id)].copy_(loaded_weight.reshape(-1))


def counted(loader: Callable[..., None], parameter: BasevLLMParameter) -> Callable[..., None]:
    """Return ``loader``, which also notes on the parameter which of its operands were loaded."""
    parameter.llm_fp4_loaded = set()
    whole = isinstance(parameter, InputParameter) and loader.__name__ != "weight_loader_v2"  # a head's or a replicated layer's

    def load(param: BasevLLMParameter, loaded: Tensor, *shard: Any, **kwargs: Any) -> None:
        if whole:
            param.load_column_parallel_weight(loaded)
        else:
            loader(param, loaded, *shard, **kwargs)
        parameter.llm_fp4_loaded.add(shard[0] if shard else kwargs.get("loaded_shard_id"))

    return load


def missing(parameter: BasevLLMParameter, operands: int) -> bool:
    """Return whether some operand's tensor was not in the checkpoint."""
    loaded: set[Any] = getattr(parameter, "llm_fp4_loaded", set())
    return None not in loaded and len(loaded) < operands


class Part:
    """Operands of a layer that run as one product; a plain object, so that nothing walks into its modules."""

    def __init__(self, linear: QuantLinear, split: bool) -> None:
        self.linear = linear
        # a scale per token spans the whole row, of which this rank has a piece
        self.agree = split and linear.spec is not None and linear.spec.granularity == "per_token"

    @classmethod
    def of(cls, layer: Any, entries: list[ModuleEntry], sizes: list[int], split: bool, bias: Tensor | None) -> list[Part]:
        """Return the parts of a loaded layer: neighbours of one format and one input together.

        Args:
            bias: (out,), which the products add before they round to the output's type; or None.
        """
        parts: list[Part] = []
        first = 0
        for last, entry in enumerate(entries):
            following = entries[last + 1] if last + 1 < len(entries) else None
            if following is not None and following.format == entry.format and _same_input(layer, entry, following, last):
                continue
            start, rows = sum(sizes[:first]), sum(sizes[first : last + 1])
            linear = _linear(layer, entry, last, slice(start, start + rows))
            linear.bias = None if bias is None else bias.data[start : start + rows]
            parts.append(cls(linear, split))
            first = last + 1
        return parts

    def __call__(self, x: Tensor) -> Tensor:
        if not self.agree:
            result: Tensor = self.linear(x)
            return result
        linear, rows = self.linear, x.reshape(-1, x.shape[-1]).float()
        spec, fmt = linear.spec, linear.weight_format
        assert spec is not None
        step = _agreed(rows, token_scale(rows, linear.input_scale, linear.input_shift, linear.input_smooth, spec.format.max_level))
        one = torch.ones((), device=rows.device)
        levels, unit = quantize_input(
            rows * (1.0 / step), one, linear.input_shift, linear.input_smooth,
            spec.format.exponent_bits, spec.format.mantissa_bits, spec.format.signed, spec.max_shift, False,
        )  # fmt: skip
        bias = None if linear.bias is None else linear.bias.float()
        weight = (linear.weight_packed, linear.weight_scale)
        out = int_linear(levels, unit * step, *weight, bias, fmt.exponent_bits, fmt.mantissa_bits)
        served: Tensor = out.to(x.dtype)
        return served.view(*x.shape[:-1], len(linear.weight_scale))


def _agreed(rows: Tensor, step: Tensor) -> Tensor:
    """Return the largest step of all ranks for each row; a rank whose piece is all zero has no say."""
    step = torch.where((rows == 0).all(-1, keepdim=True), torch.zeros_like(step), step)
    torch.distributed.all_reduce(step, torch.distributed.ReduceOp.MAX, group=get_tp_group().device_group)
    return torch.where(step == 0, torch.ones_like(step), step)


def _same_input(layer: Any, a: ModuleEntry, b: ModuleEntry, index: int) -> bool:
    kept = (getattr(layer, n, None) for n in ("weight_global_scale", "input_scale", "input_shift", "input_smooth"))
    return a.input == b.input and all(t is None or torch.equal(t[index], t[index + 1]) for t in kept)


def _linear(layer: Any, entry: ModuleEntry, index: int, rows: slice) -> QuantLinear:
    """Return our layer over views of the served layer's parameters."""
    spec: InputSpec | None = None if entry.input is None else replace(entry.input)
    packed = layer.weight_packed.data[rows]
    columns = layer.input_size_per_partition
    linear = QuantLinear(columns, len(packed), entry.format, spec, bias=False, device="meta", blocks=entry.blocks)
    linear.weight_packed, linear.weight_scale = packed, layer.weight_scale.data[rows]
    if entry.blocks is not None and entry.blocks.two_level:
        linear.weight_global_scale = layer.weight_global_scale.data[index, 0]
    if spec is not None:
        linear.input_scale = layer.input_scale.data[index, 0]
        linear.input_shift = layer.input_shift.data[index] if spec.max_shift else None
        linear.input_smooth = layer.input_smooth.data[index] if spec.smooth else None
    return linear
