"""Reading safetensors: a directory's tensors by name, one at a time, over the mapped files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm_fp4.errors import LlmFp4Error, SourceError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip


class TensorFiles:
    """The tensors of a directory of safetensors files, found through the index or the files' own headers.

    Args:
        error: what to raise.
    Raises:
        SourceError (or ``error``): no safetensors, an index that names a missing file, or a truncated or corrupt file.
    """

    def __init__(self, folder: Path, error: type[LlmFp4Error] = SourceError) -> None:
        self.folder, self._error = folder, error
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise self._error(f"{index} is not a valid shard index; download or save the model again") from None
            for file in files:
                if not isinstance(file, str) or Path(file).name != file:
                    raise self._error(f"{index} names {file!r}, which is not a file of this directory; the index is corrupt")
        else:
            files = sorted(p.name for p in folder.glob("*.safetensors"))
        if not files:
            pickled = next(iter(sorted(folder.glob("*.bin"))), None)
            hint = f"; {pickled.name} is a pickle, save the model again as safetensors" if pickled else ""
            raise self._error(f"{folder} holds no .safetensors file{hint}")
        self.where: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for file in files:
            self._read_header(folder / file)

    def _read_header(self, path: Path) -> None:
        if not path.is_file():
            raise self._error(f"{path} is missing, though the index of {self.folder} names it; download the model again")
        try:
            with safe_open(path, "pt") as handle:
                names = handle.keys()
                for name in names:
                    piece = handle.get_slice(name)
                    self.where[name], self.shapes[name] = path, tuple(piece.get_shape())
                    self._dtypes[name] = _DTYPES.get(piece.get_dtype(), torch.uint8)
        except (SafetensorError, OSError) as error:
            raise self._error(f"{path} is not a complete safetensors file ({error}); download or save it again") from None

    def names(self) -> Iterable[str]:
        """Return the names of all tensors."""
        return self.where.keys()

    def get(self, name: str) -> Tensor:
        """Return the tensor called ``name`` in its stored dtype, over the mapped file.

        Raises:
            SourceError: there is no such tensor.
        """
        if name not in self.where:
            raise self._error(f"{self.folder} has no tensor {name!r}; the checkpoint is incomplete or of another model")
        with safe_open(self.where[name], "pt") as handle:
            tensor: Tensor = handle.get_tensor(name)
        return tensor

    def dtype(self, name: str) -> torch.dtype:
        """Return the type a tensor is stored in; float32 where there is no such tensor."""
        return self._dtypes.get(name, torch.float32)
