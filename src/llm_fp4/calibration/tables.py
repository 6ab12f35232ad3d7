"""Readers of Parquet files and hub data sets; their libraries are optional and loaded when used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llm_fp4.calibration.text import Stretch, text_field, without_surrogates
from llm_fp4.errors import CalibrationError

ROWS = 256  # read at once
INSTALL = "pip install 'llm-fp4[data]'"


def read_parquet(path: Path) -> Iterator[Stretch]:
    """Yield the text of each row, each a document: the column ``text``, else the first column of strings.

    Raises:
        CalibrationError: pyarrow is missing, the file is damaged, or no column holds strings.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise CalibrationError(f"reading {path} needs pyarrow; install it: {INSTALL}") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            strings = [f.name for f in schema if pyarrow.types.is_string(f.type) or pyarrow.types.is_large_string(f.type)]
            if not strings:
                raise CalibrationError(
                    f"{path} has no column of strings (columns: {', '.join(schema.names) or 'none'}); name the text column 'text'"
                )
            column = "text" if "text" in strings else strings[0]
            for batch in file.iter_batches(batch_size=ROWS, columns=[column]):
                for text in batch.column(0).to_pylist():
                    if text is not None:
                        yield text, True
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} is not a readable Parquet file ({_first_line(error)}); fetch or write it again") from error


def read_hub(name: str) -> Iterator[Stretch]:
    """Yield the text of each record of the train split of a hub data set, ``name`` or ``name:config``, streamed.

    Raises:
        CalibrationError: the library is missing, or the data set cannot be reached or has no text.
    """
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"{name!r} is no file here, and reading it as a hub data set needs the datasets library: {INSTALL}"
        ) from error
    repository, _, config = name.partition(":")
    field = None
    try:
        for record in datasets.load_dataset(repository, config or None, split="train", streaming=True):
            field = field or text_field(record, f"data set {name!r}")
            text = record.get(field)
            if isinstance(text, str):
                yield without_surrogates(text), True
    except CalibrationError:
        raise
    except Exception as error:  # the library raises whatever its network, file system or parser raised
        raise CalibrationError(
            f"hub data set {name!r} cannot be read ({_first_line(error)}); check the name (name:config where it has several) "
            "and the network, or calibrate on a local file or on 'self'"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
