"""The float model that a checkpoint is compared with, asked for a layer by the checkpoint's own name of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llm_fp4.doctor.gguf_file import GgufFile
from llm_fp4.doctor.stored import Checkpoint
from llm_fp4.export.gguf_model import rotary_rows
from llm_fp4.models import FloatModel


class FloatWeights:
    """Weights of an opened float model; of a GGUF file under its names, and in its order of rows."""

    def __init__(self, opened: FloatModel, checkpoint: Checkpoint) -> None:
        self.opened = opened
        model: Any = opened.model
        self.config: Any = model.config
        self.names: dict[str, str] | None = None
        if isinstance(checkpoint, GgufFile):
            import gguf

            known: Any = getattr(gguf.MODEL_ARCH, checkpoint.architecture.upper(), None)
            places: Any = None if known is None else gguf.get_tensor_name_map(known, self.config.num_hidden_layers)
            modules = (n.removesuffix(".weight") for n, _ in opened.model.named_parameters(remove_duplicate=False))
            self.names = {} if places is None else {str(places.get_name(n)): n for n in modules}

    def __call__(self, name: str) -> Tensor | None:
        """Return the (rows, columns) float32 weight of a layer, or None where the model has none of that name."""
        own = name if self.names is None else self.names.get(name)
        own = own.removesuffix(".patches") if own else own  # stored as a convolution
        if own is None:
            return None
        try:
            parameter = self.opened.model.get_parameter(f"{own}.weight")
        except AttributeError:
            return None
        stored = self.opened.source.table(f"{own}.weight") if parameter.is_meta else parameter.detach()
        if stored is None:
            return None
        weight = stored.float().flatten(1)
        return weight if self.names is None else rotary_rows(weight, own, self.config.to_dict())
