"""Is a loaded model a decoder that the compiled blocks can run? Judged by its modules, not by its name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llm_fp4.errors import UnsupportedError
from llm_fp4.kernels import decoding
from llm_fp4.nn import PREFIX, CacheCodes, QuantLinear, prefix_length

_BLOCK = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "rotary_emb", PREFIX}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def check_decoder(model: Any) -> None:
    """Check that the compiled blocks compute all of ``model``.

    Raises:
        UnsupportedError: they do not; the message names the part.
    """
    inner: Any = getattr(model, "model", None)
    parts = ("embed_tokens", "layers", "norm", "rotary_emb")
    for part in parts:
        _require(hasattr(inner, part), f"{type(model).__name__} has no model.{part}")
    _require(hasattr(model, "lm_head"), f"{type(model).__name__} has no lm_head")
    _require(decoding.available(), "this installation has no compiled CPU kernels, or they are switched off")
    on_cpu = all(t.device.type == "cpu" for t in (*model.parameters(), *model.buffers()))
    _require(on_cpu, "the model is not in the memory of the CPU")
    kind = getattr(inner.rotary_emb, "rope_type", "default")
    _require(kind not in ("dynamic", "longrope"), f"its {kind} rotary positions change with the length")
    _require(not any(isinstance(m, CacheCodes) for m in model.modules()), "its keys and values are kept in codes")
    kinds = getattr(model.config, "layer_types", None)
    windows = getattr(model.config, "sliding_window", None) if kinds is None else set(kinds) - {"full_attention"}
    _require(not windows, "it attends to a sliding window or to another part of the text")
    lengths = {prefix_length(block.self_attn) for block in inner.layers if hasattr(block, "self_attn")}
    _require(len(lengths) < 2, "its blocks see prefixes of different lengths")
    for i, block in enumerate(inner.layers):
        _check_block(block, f"model.layers.{i}")


def operands_of(module: nn.Module, names: tuple[str, ...], where: str) -> list[QuantLinear]:
    """Return the quantized linears ``names`` of one input.

    Raises:
        UnsupportedError: one is float, of a pair that does not run on integers, or reads its input otherwise than the first.
    """
    found: list[QuantLinear] = []
    for name in names:
        child = getattr(module, name, None)
        _require(isinstance(child, QuantLinear), f"{where}.{name} is not quantized")
        assert isinstance(child, QuantLinear)
        _require(child.input_left is None, f"the input of {where}.{name} passes a learned transform")
        _require(child.input_offset is None, f"{where}.{name} subtracts an offset from its input")
        integers = child.exact and (child.weight_format.bits == 4 or child.weight_format.name == "e1m6")
        weight_only = child.spec is None and child.blocks is None and child.weight_format.bits == 4
        _require(
            integers or weight_only or decoding.covers_blocks(child.weight_format, child.blocks, child.spec),
            f"{where}.{name} does not multiply integers",
        )
        found.append(child)
    first = found[0]
    same = all(f is first or (f.spec is None and first.spec is None) or _one_site(f, first) for f in found)
    _require(same, f"{', '.join(names)} of {where} round their input differently")
    return found


def _one_site(a: QuantLinear, b: QuantLinear) -> bool:
    """Return whether two linears quantize what they read alike."""
    if a.spec is not None and a.spec.blocks is not None:
        return a.spec == b.spec and torch.equal(a.input_scale, b.input_scale)
    return a.site is not None and a.site is b.site


def _check_block(block: nn.Module, where: str) -> None:
    _require({n for n, _ in block.named_children()} == _BLOCK, f"{where} is made of other parts than attention and a gated MLP")
    attention, mlp = block.get_submodule("self_attn"), block.get_submodule("mlp")
    extra = {n for n, _ in attention.named_children()} - _ATTENTION | {n for n, _ in mlp.named_children()} - _MLP
    _require(not extra, f"{where} also has {', '.join(sorted(extra))}")
    for norm in (block.input_layernorm, block.post_attention_layernorm):
        _require(_epsilon(norm) is not None and getattr(norm, "bias", None) is None, f"{where} has a {type(norm).__name__}")
    probe = torch.linspace(-3, 3, 7)
    act: Any = getattr(mlp, "act_fn", None)
    silu = act is not None and torch.allclose(act(probe), nn.functional.silu(probe), atol=1e-6)
    _require(silu, f"{where}.mlp has another activation than SiLU")


def _epsilon(norm: Any) -> float | None:
    value = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return None if value is None else float(value)


def epsilon(norm: Any) -> float:
    """Return what an RMSNorm adds to the mean square."""
    value = _epsilon(norm)
    assert value is not None
    return value


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise UnsupportedError(f"one token at a time in compiled code is not possible: {problem}; transformers runs this model")
