"""Decoding one token at a time in compiled code: all blocks in one call, no Python between the products.

The prompt runs through the model itself; its keys and values are copied once. Hidden states and the cache are float32. A prefix lies
first in the cache, before position 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llm_fp4.errors import UnsupportedError
from llm_fp4.integrations.recognize import check_decoder, epsilon, operands_of
from llm_fp4.kernels.decoding import Block, Norm, Pinned, Site, run_blocks, site_linear
from llm_fp4.nn import PREFIX, QuantLinear, prefix_length

_PROBE = 6  # tokens on which the model and its decoder are compared
_AGREE = {torch.float32: 0.05, torch.float64: 0.05}  # relative difference of the logits; a rounding that falls the other
_AGREE_NARROW = 0.4  # way moves them a little, a model of narrow floats rounds otherwise everywhere


class Decoder:
    """A loaded, quantized decoder of the LLaMA kind (RMSNorm, rotary positions, grouped queries, gated SiLU) for one sequence.

    Args:
        model: as ``llm_fp4.load`` returns it; its packed weights are read in place. capacity: tokens the cache first holds.
    Raises:
        UnsupportedError: the model has a part that the compiled blocks do not compute, or its logits differ on a probe.
    """

    def __init__(self, model: Any, capacity: int = 256) -> None:
        check_decoder(model)
        self.model, self.position, self.capacity = model, 0, 0
        self._pinned = Pinned()
        try:
            self._build()
            self._grow(max(capacity, _PROBE))
            self._compare()
        except (AttributeError, TypeError, IndexError) as error:  # a part of the right name and of another make
            raise UnsupportedError(
                f"one token at a time in compiled code is not possible: {type(model).__name__} is made otherwise ({error}); "
                "transformers runs this model"
            ) from None

    @torch.inference_mode()
    def prompt(self, ids: Tensor) -> Tensor:
        """Return the (vocabulary,) float32 logits after the (tokens,) int64 ``ids``, which start a new sequence."""
        out = self.model(ids[None], use_cache=True, logits_to_keep=1)
        self._grow(len(ids))
        for i, layer in enumerate(out.past_key_values.layers):
            self._keys[i][:, self._before : self._before + len(ids)] = layer.keys[0]
            self._values[i][:, self._before : self._before + len(ids)] = layer.values[0]
        self.position = len(ids)
        logits: Tensor = out.logits[0, -1].float()
        return logits

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        """Return the (vocabulary,) float32 logits after one more token."""
        if self.position == self.capacity:
            self._grow(2 * self.capacity)
        hidden = self.model.model.embed_tokens(torch.tensor([token]))[0].float().contiguous()
        run_blocks(self._blocks, hidden, self._cosine[self.position], self._sine[self.position], self._before + self.position)
        self.position += 1
        head = self.model.lm_head
        if self._head is not None:
            logits = torch.empty(head.rows)
            site_linear(self._norm, self._head, hidden, logits)
            return logits
        result: Tensor = head(self.model.model.norm(hidden).to(head.weight.dtype)).float()
        return result

    # --- making it -----------------------------------------------------------------------------------

    def _build(self) -> None:
        inner = self.model.model
        self._before = prefix_length(inner.layers[0].self_attn)
        self._keys, self._values = [[torch.empty(0)] * len(inner.layers) for _ in range(2)]
        self._blocks = (Block * len(inner.layers))(*(self._block(b, f"model.layers.{i}") for i, b in enumerate(inner.layers)))
        self._norm = self._norm_of(inner.norm)
        self._head = self._head_of(self.model.lm_head)

    def _norm_of(self, norm: Any) -> Norm:
        return self._pinned.norm(None) if norm is None else self._pinned.norm(norm.weight, None, epsilon(norm))

    def _site(self, module: Any, names: tuple[str, ...], where: str) -> Site:
        linears = operands_of(module, names, where)
        first = linears[0]
        operands = [self._pinned.operand(m.quantized, m.bias) for m in linears]
        scale = None if first.spec is None else first.input_scale
        return self._pinned.site(first.columns, first.spec, scale, first.input_shift, first.input_smooth, operands)

    def _block(self, block: Any, where: str) -> Block:
        attention, d = block.self_attn, block.self_attn.head_dim
        return Block(
            before_attention=self._norm_of(block.input_layernorm), of_queries=self._norm_of(getattr(attention, "q_norm", None)),
            of_keys=self._norm_of(getattr(attention, "k_norm", None)), before_mlp=self._norm_of(block.post_attention_layernorm),
            qkv=self._site(attention, ("q_proj", "k_proj", "v_proj"), f"{where}.self_attn"),
            output=self._site(attention, ("o_proj",), f"{where}.self_attn"),
            gate_up=self._site(block.mlp, ("gate_proj", "up_proj"), f"{where}.mlp"),
            down=self._site(block.mlp, ("down_proj",), f"{where}.mlp"),
            heads=attention.q_proj.rows // d, kv_heads=attention.k_proj.rows // d, head_dim=d, attention_scale=attention.scaling,
        )  # fmt: skip

    def _head_of(self, head: Any) -> Site | None:
        """Return the packed head, or None for a float one."""
        return self._site(self.model, ("lm_head",), "the model") if isinstance(head, QuantLinear) else None

    def _grow(self, capacity: int) -> None:
        """Make the cache hold at least ``capacity`` tokens, keeping those it has."""
        if capacity <= self.capacity:
            return
        for cache, state in ((self._keys, "prefix_key"), (self._values, "prefix_value")):
            for i, block in enumerate(self._blocks):
                larger = torch.zeros(block.kv_heads, self._before + capacity, block.head_dim)
                if self.capacity:
                    larger[:, : self._before + self.capacity] = cache[i]
                elif self._before:
                    larger[:, : self._before] = getattr(self.model.model.layers[i].self_attn.get_submodule(PREFIX), state)
                cache[i] = larger
        for block, keys, values in zip(self._blocks, self._keys, self._values, strict=True):
            block.keys, block.values, block.capacity = keys.data_ptr(), values.data_ptr(), self._before + capacity
        cosine, sine = self.model.model.rotary_emb(torch.zeros(1), torch.arange(capacity)[None])
        self._cosine, self._sine = cosine[0].float().contiguous(), sine[0].float().contiguous()
        self.capacity = capacity

    @torch.inference_mode()
    def _compare(self) -> None:
        """Raise UnsupportedError where the model's own logits on a probe are not these."""
        ids = torch.linspace(0, self.model.model.embed_tokens.num_embeddings - 1, _PROBE).long()
        expected = self.model(ids[None], use_cache=False).logits[0].float()
        alone = [self.step(int(token)) for token in ids]
        after = [self.prompt(ids[: _PROBE // 2]), *(self.step(int(token)) for token in ids[_PROBE // 2 :])]
        self.position = 0
        got, expected = torch.stack([*alone, *after]), torch.cat((expected, expected[_PROBE // 2 - 1 :]))
        difference = float((got - expected).norm() / expected.norm().clamp(min=1e-30))
        if not difference <= _AGREE.get(self.model.dtype, _AGREE_NARROW):
            raise UnsupportedError(
                f"one token at a time in compiled code gives other logits than {type(self.model).__name__} (by {difference:.2f}); "
                "transformers runs this model"
            )
