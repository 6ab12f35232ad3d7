"""transformers reads our checkpoints: AutoModel.from_pretrained builds the quantized modules before it loads tensors."""

from __future__ import annotations

from itertools import chain
from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llm_fp4.checkpoint import METHOD, Manifest, read_attention, read_caches, read_manifest, read_prefix
from llm_fp4.errors import CheckpointError
from llm_fp4.nn import (
    CACHE,
    CHILD,
    AttentionPrefix,
    AttentionProducts,
    CacheCodes,
    PackedModule,
    borrow_weight,
    forget_wholes,
    fused_experts,
    place_prefix,
    replace_module,
    separate_patches,
    share_inputs,
    share_weight,
    take_apart,
)
from llm_fp4.plan import AttentionSpec, CacheSpec, PrefixSpec


@register_quantization_config(METHOD)
class LlmFp4Config(QuantizationConfigMixin):
    """``quantization_config`` of a checkpoint: its manifest, as read."""

    def __init__(self, **fields: Any) -> None:
        self.quant_method = METHOD
        self.__dict__.update(fields)


@register_quantizer(METHOD)
class LlmFp4Quantizer(HfQuantizer):
    """Loads checkpoints that llm-fp4 quantized; it does not quantize while loading."""

    requires_calibration = True

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    def _manifest(self) -> Manifest:
        return read_manifest(self.quantization_config.to_dict(), "config.json")

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        manifest = self._manifest()
        install(model, manifest)
        install_attention(model, read_attention(self.quantization_config.to_dict(), "config.json"))
        install_caches(model, read_caches(self.quantization_config.to_dict(), "config.json"))
        install_prefix(model, read_prefix(self.quantization_config.to_dict(), "config.json"))
        # transformers ties parameters by name; these names are gone, and packed weights are shared after loading
        for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
            keys = getattr(model, attribute, None)
            if isinstance(keys, dict):
                kept = {k: v for k, v in keys.items() if {k.rpartition(".")[0], v.rpartition(".")[0]}.isdisjoint(manifest)}
                setattr(model, attribute, kept)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        share(model, self._manifest())
        share_inputs(model)
        return model


def install(model: nn.Module, manifest: Manifest) -> None:
    """Put an empty quantized module in every place the manifest lists.

    Raises:
        CheckpointError: the model has no such module, or one of another shape.
    """
    wholes = {name.rpartition(".")[0] for name in manifest}
    for name, module, own in list(fused_experts(model)):
        if f"{name}.{own}" in wholes:
            take_apart(module, own)
    separate_patches(model, manifest.__contains__)
    forget_wholes(model)
    for name, entry in manifest.items():
        replace_module(model, name, entry.format, entry.input, entry.shape, entry.multiplier, entry.blocks, entry.added_bias)
        if entry.tied_to is not None:
            head = model.get_submodule(name)
            assert isinstance(head, PackedModule)
            borrow_weight(head)


def install_attention(model: nn.Module, attention: dict[str, AttentionSpec]) -> None:
    """Give every attention module that is listed the place for its scales, and route attention through them.

    Raises:
        CheckpointError: the model has no such module, or its attention cannot be routed.
    """
    if not attention:
        return
    # only now: this file is read while transformers itself is being imported
    from llm_fp4.integrations.attention import use_quantized_attention

    for name, spec in attention.items():
        owner = _attention(model, name, "attention")
        owner.add_module(CHILD, AttentionProducts(spec, _device(owner, model)))
    if not use_quantized_attention(model):
        raise CheckpointError(
            f"{type(model).__name__} does not run attention through transformers' interface here; use the version that quantized it"
        )


def install_caches(model: nn.Module, caches: dict[str, CacheSpec]) -> None:
    """Give every attention module that is listed the place for its cache's scales, and let it keep codes.

    Raises:
        CheckpointError: the model has no such module.
    """
    if not caches:
        return
    from llm_fp4.integrations.cache import keep_in_codes  # only now, as above

    for name, spec in caches.items():
        owner = _attention(model, name, "cache of")
        owner.add_module(CACHE, CacheCodes(spec, _device(owner, model)))
    keep_in_codes(model)


def install_prefix(model: nn.Module, prefix: dict[str, PrefixSpec]) -> None:
    """Give every attention module that is listed the place for its prefix, and route attention past it.

    Raises:
        CheckpointError: the model has no such module, or its attention cannot be routed.
    """
    if not prefix:
        return
    from llm_fp4.integrations.attention import use_prefixed_attention  # only now, as above

    for name, spec in prefix.items():
        owner = _attention(model, name, "prefix of")
        place_prefix(owner, AttentionPrefix(spec, _device(owner, model)))
    if not use_prefixed_attention(model):
        raise CheckpointError(
            f"{type(model).__name__} does not run attention through transformers' interface here; use the version that quantized it"
        )


def _attention(model: nn.Module, name: str, what: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(
            f"the checkpoint describes the {what} {name}, which {type(model).__name__} does not have; they do not belong together"
        ) from None


def _device(owner: nn.Module, model: nn.Module) -> Any:
    return next(chain(owner.parameters(), owner.buffers(), model.parameters())).device


def share(model: nn.Module, manifest: Manifest) -> None:
    """Give every tied head the packed weight of its embedding."""
    for name, entry in manifest.items():
        if entry.tied_to is not None:
            head, owner = model.get_submodule(name), model.get_submodule(entry.tied_to)
            assert isinstance(head, PackedModule)
            assert isinstance(owner, PackedModule)
            share_weight(head, owner)
