"""A float twin of a quantized model, which other tools can trace; its weights are exchanged for packed ones afterwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llm_fp4.errors import UnsupportedError
from llm_fp4.nn import PackedModule, QuantEmbedding, QuantLinear


class _ScaledEmbedding(nn.Embedding):
    """An embedding whose rows are multiplied by a constant (Gemma)."""

    multiplier = 1.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.multiplier


class TextGraph(nn.Module):
    """``(input_ids, attention_mask) → logits``, the whole sequence at once, without a cache.

    Args:
        model: a loaded checkpoint; its quantized modules are replaced in place by float ones of the same values.
    Raises:
        UnsupportedError: the model reads something other than token ids.
    """

    inputs = ("input_ids", "attention_mask")

    def __init__(self, model: Any) -> None:
        super().__init__()
        if (wants := getattr(model, "main_input_name", "input_ids")) != "input_ids":
            raise UnsupportedError(
                f"{type(model).__name__} reads {wants}; whole-model exports are implemented for models of text (input_ids)"
            )
        if hasattr(model, "set_attn_implementation"):
            # written out, so that masks are large finite numbers: a row that is masked whole stays free of NaN
            model.set_attn_implementation("eager")
        float_twin(model)
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        arguments = {"use_cache": False} if getattr(self.model.config, "use_cache", None) is not None else {}
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, **arguments)
        result: Tensor = out.logits if "logits" in out else out.last_hidden_state
        return result

    @property
    def output(self) -> str:
        """The name of what the graph returns."""
        return (
            "logits" if self.model.get_output_embeddings() is not None or hasattr(self.model, "classifier") else "last_hidden_state"
        )

    def example(self) -> tuple[Tensor, Tensor]:
        """Return inputs to trace with: two sequences of eight tokens."""
        top = int(self.model.get_input_embeddings().weight.shape[0])
        ids = torch.arange(16).reshape(2, 8) % top
        return ids, torch.ones_like(ids)


def float_twin(model: nn.Module) -> None:
    """Replace every quantized module of ``model`` by a float one of the same values, in place; shared weights stay shared."""
    shared: dict[int, nn.Parameter] = {}
    for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, PackedModule)]:
        key = module.weight_packed.data_ptr()
        if key not in shared:
            shared[key] = nn.Parameter(module.quantized.dequantize(), requires_grad=False)
        twin: nn.Module
        if isinstance(module, QuantLinear):
            twin = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            bias = None if module.bias is None else nn.Parameter(module.bias.float(), requires_grad=False)
            if module.input_offset is not None:  # the bias holds W z, but a float input has z in it still
                assert module.bias is not None
                constant = module.bias.double() - shared[key].double() @ module.input_offset.double()
                bias = nn.Parameter(constant.float(), requires_grad=False)
            twin.register_parameter("bias", bias)
        else:
            assert isinstance(module, QuantEmbedding)
            twin = _ScaledEmbedding(module.num_embeddings, module.embedding_dim, device="meta")
            twin.multiplier = module.multiplier
        twin.weight = shared[key]
        model.set_submodule(name, twin)
