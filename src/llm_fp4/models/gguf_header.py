"""Reading the header of a GGUF file far enough to refuse a truncated one, or one whose sizes its tensors do not have.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_fp4.errors import SourceError

_FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # value type → struct code
_STRING, _ARRAY = 8, 9
_SIZES = (
    ".embedding_length", ".feed_forward_length", ".attention.head_count", ".attention.head_count_kv", ".attention.key_length",
    ".attention.value_length", ".vocab_size",
)  # fmt: skip


def check_gguf(path: Path) -> None:
    """Raise SourceError unless the header is whole, its sizes are those of the tensors, and the tensors lie within the file."""
    damaged = f"{path} is truncated or corrupt"
    with path.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise SourceError(f"{path} does not start as a GGUF file; it is corrupt or something else")
        try:
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
                values, shapes, end = _header(_Reader(data))
                length = len(data)
        except (struct.error, ValueError, KeyError, OverflowError):
            raise SourceError(f"{damaged}: its header does not end as it should; download it again") from None
    if end >= length:
        raise SourceError(f"{damaged}: a tensor begins at byte {end:,}, the file has {length:,}; download it again")
    widest = max((max(shape, default=1) for shape in shapes), default=0)
    for key, value in values.items():
        limit = len(shapes) if key.endswith(".block_count") else 4 * widest if key.endswith(_SIZES) else None
        if limit is not None and isinstance(value, int) and not 0 <= value <= limit:
            raise SourceError(
                f"{damaged}: it states {key} {value:,}, which its {len(shapes):,} tensors cannot have; download it again"
            )


class _Reader:
    def __init__(self, data: Any) -> None:
        self.data, self.at = data, 4

    def take(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def text(self) -> str:
        length = self.take("Q")
        if length > len(self.data) - self.at:
            raise ValueError("a text beyond the end")
        self.at += length
        return str(self.data[self.at - length : self.at], "utf-8", "replace")

    def value(self) -> Any:
        """Return one value; of an array only its length."""
        kind = self.take("I")
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.take(_FIXED[kind])
        kind, length = self.take("I"), self.take("Q")
        if kind in _FIXED:
            self.at += length * struct.calcsize(f"<{_FIXED[kind]}")
        else:
            read: Callable[[], object] = {_STRING: self.text}[kind]  # arrays of arrays exist in the specification only
            for _ in range(length):
                read()
        return range(length)


def _header(reader: _Reader) -> tuple[dict[str, Any], list[tuple[int, ...]], int]:
    """Return the metadata, the tensors' shapes and the first byte of the last tensor."""
    reader.take("I")  # the version
    tensors, pairs = reader.take("Q"), reader.take("Q")
    values = {}
    for _ in range(pairs):
        key = reader.text()
        values[key] = reader.value()
    shapes, last = [], 0
    for _ in range(tensors):
        reader.text()
        shapes.append(tuple(reader.take("Q") for _ in range(reader.take("I"))))
        reader.take("I")  # the type
        last = max(last, reader.take("Q"))
    return values, shapes, reader.at + last
