"""Where float weights come from: safetensors read tensor by tensor, or a model already in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llm_fp4.errors import SourceError
from llm_fp4.nn import PackedModule
from llm_fp4.storage import TensorFiles

Wanted = Callable[[str], bool]


def everything(name: str) -> bool:
    """Want every tensor."""
    return True


class WeightSource(Protocol):
    """Gives parameters by name; ``load`` makes a module real, ``release`` takes its memory back."""

    def load(self, model: nn.Module, name: str, device: torch.device, wanted: Wanted = everything) -> nn.Module:
        """Return the submodule ``name`` of ``model`` with every parameter whose full name is ``wanted`` real."""
        ...

    def release(self, model: nn.Module, name: str) -> None:
        """Take back the memory of the submodule ``name``, as far as :meth:`load` can bring its parameters again."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Return the type in which the tensor ``name`` is stored."""
        ...

    def table(self, name: str) -> Tensor | None:
        """Return the stored tensor over its mapped file, or None where it is in memory anyway."""
        ...

    def part(self, name: str, stored: str, index: int | None, transposed: bool) -> None:
        """Note that the tensor ``name`` is the matrix ``index`` of the tensor ``stored``, or its transpose; of no index, all of it, its
        last axes flattened."""
        ...


class InMemory:
    """A model that is all there: nothing is loaded or released."""

    def __init__(self, model: nn.Module) -> None:
        self._dtypes = {n: t.dtype for n, t in model.state_dict().items()}

    def load(self, model: nn.Module, name: str, device: torch.device, wanted: Wanted = everything) -> nn.Module:
        return model.get_submodule(name).to(device)

    def release(self, model: nn.Module, name: str) -> None:
        pass

    def dtype(self, name: str) -> torch.dtype:
        found: torch.dtype = self._dtypes.get(name, torch.float32)
        return found

    def table(self, name: str) -> Tensor | None:
        return None

    def part(self, name: str, stored: str, index: int | None, transposed: bool) -> None:
        self._dtypes[name] = self.dtype(stored)


class LazyFiles:
    """Loads modules of a meta-device model from files, as float32, and sends them back to meta."""

    def __init__(self, files: TensorFiles, renames: dict[str, str] | None = None) -> None:
        self.files = files
        self._renames = renames or {}  # name in the model → name in the files (tied weights)
        self._parts: dict[str, tuple[str, int | None, bool]] = {}  # name in the model → stored tensor, index, whether transposed

    def check(self, model: nn.Module) -> None:
        """Check every tensor of ``model`` against the files' headers, so that a run does not stop in the middle.

        Raises:
            SourceError: a tensor is missing or of another shape or an integer type.
        """
        for full, _, _, tensor in _tensors(model, ""):
            if tensor.is_meta:
                stored = self._renames.get(full, full)
                if stored in self.files.where:
                    self._check(full, self.files.shapes[stored], tuple(tensor.shape), self.files.dtype(stored))
                else:
                    raise SourceError(f"{self.files.folder} has no tensor {stored!r}; the model is incomplete, download it again")

    def _check(self, full: str, found: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if found != shape:
            raise SourceError(
                f"{full} is {found} in {self.files.folder}, but config.json makes it {shape}; they do not belong together"
            )
        if not dtype.is_floating_point:
            raise SourceError(f"{full} in {self.files.folder} is {dtype}, not a float type; quantize from the float model")

    def load(self, model: nn.Module, name: str, device: torch.device, wanted: Wanted = everything) -> nn.Module:
        """Return the submodule ``name`` of ``model`` with every parameter whose full name is ``wanted`` real, float32.

        Raises:
            SourceError: a tensor is missing or of another shape or an integer type.
        """
        module = model.get_submodule(name)
        for full, owner, child, tensor in list(_tensors(module, name)):
            stored = child in owner._buffers and tensor.is_floating_point() and self._renames.get(full, full) in self.files.where
            if (tensor.is_meta or stored) and wanted(full) and not isinstance(owner, PackedModule):
                value = self._read(full, tuple(tensor.shape)).to(device, torch.float32)
                if child in owner._parameters:
                    owner._parameters[child] = nn.Parameter(value, requires_grad=False)
                else:
                    owner._buffers[child] = value
        return module

    def _read(self, full: str, shape: tuple[int, ...]) -> Tensor:
        whole, index, transposed = self._parts.get(full, (self._renames.get(full, full), None, False))
        value = self.files.get(whole)
        value = value if index is None else value[index]
        value = value.flatten(1) if index is None and full in self._parts and value.dim() > 2 else value
        value = value.t() if transposed else value
        self._check(full, tuple(value.shape), shape, value.dtype)
        return value

    def release(self, model: nn.Module, name: str) -> None:
        """Send what :meth:`load` can bring back to the meta device; buffers that no file holds stay."""
        for _, owner, child, tensor in list(_tensors(model.get_submodule(name), name)):
            if child in owner._parameters:
                owner._parameters[child] = nn.Parameter(tensor.to("meta"), requires_grad=False)
            elif isinstance(owner, PackedModule):
                owner._buffers[child] = tensor.to("meta")

    def dtype(self, name: str) -> torch.dtype:
        return self.files.dtype(self._parts[name][0] if name in self._parts else self._renames.get(name, name))

    def part(self, name: str, stored: str, index: int | None, transposed: bool) -> None:
        self._parts[name] = (self._renames.get(stored, stored), index, transposed)

    def table(self, name: str) -> Tensor | None:
        return self.files.get(self._renames.get(name, name))


def _tensors(module: nn.Module, prefix: str) -> Iterable[tuple[str, nn.Module, str, Tensor]]:
    """Yield (full name, owner, own name, tensor) of every parameter and persistent buffer below ``module``."""
    for path, owner in module.named_modules(remove_duplicate=False):
        full = ".".join(p for p in (prefix, path) if p)
        own: dict[str, Any] = dict(owner._parameters)
        own.update({n: b for n, b in owner._buffers.items() if n not in owner._non_persistent_buffers_set})
        for child, tensor in own.items():
            if tensor is not None:
                yield (f"{full}.{child}" if full else child), owner, child, tensor
