"""The compiled CPU kernels, loaded with ctypes: found, declared and chosen here; ``cpu`` registers them."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
from ctypes import c_char_p, c_double, c_int, c_int64, c_void_p
from functools import lru_cache

from llm_fp4.errors import UnsupportedError

_VERSION = 6  # of the argument lists below; csrc/binding.cpp has the same number
_VARIABLE = "LLM_FP4_KERNEL"
_TORCH = "torch"  # the name that leaves everything to the reference bodies

_ARGUMENTS: dict[str, list[type]] = {
    "llm_fp4_quantize_input": [
        c_void_p, c_int, c_int64, c_int64, c_void_p, c_void_p, c_void_p,
        c_int, c_int, c_int, c_int, c_int, c_int, c_void_p, c_void_p, c_int,
    ],
    "llm_fp4_norm_quantize_input": [
        c_void_p, c_int, c_int64, c_int64, c_void_p, c_void_p, c_double, c_int, c_void_p, c_void_p, c_void_p,
        c_int, c_int, c_int, c_int, c_int, c_void_p, c_void_p, c_int,
    ],
    "llm_fp4_quantized_linear": [
        c_void_p, c_int, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int, c_int, c_int, c_int, c_int,
        c_void_p, c_int64, c_void_p, c_void_p, c_int, c_int, c_int, c_void_p, c_int,
    ],
    "llm_fp4_block_float_linear": [
        c_void_p, c_int, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int, c_int, c_void_p, c_void_p, c_int, c_int, c_void_p, c_int,
    ],
    "llm_fp4_quantized_block_linear": [
        c_void_p, c_int, c_int64, c_int64, c_int, c_int, c_void_p, c_int, c_int, c_void_p, c_int64, c_void_p, c_int, c_int,
        c_void_p, c_void_p, c_int, c_int, c_int, c_void_p, c_int,
    ],
    "llm_fp4_hadamard": [c_void_p, c_int64, c_int64, c_void_p, c_int],
    "llm_fp4_site_linear": [c_void_p, c_void_p, c_void_p, c_void_p, c_int],
    "llm_fp4_run_blocks": [c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int],
    "llm_fp4_int_linear": [
        c_void_p, c_int, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_int, c_int, c_void_p, c_int,
    ],
    "llm_fp4_float_linear": [
        c_void_p, c_int, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_int, c_int, c_void_p, c_int,
    ],
}  # fmt: skip


@lru_cache(maxsize=1)
def _compiled() -> ctypes.CDLL | None:
    """Return the compiled library, or None, said once, where it is missing or of another version."""
    spec = importlib.util.find_spec("llm_fp4.kernels._cpu")
    problem = "this installation has none: it was built without a C++ compiler"
    if spec is not None and spec.origin is not None:
        try:
            library = ctypes.CDLL(spec.origin)
            if library.llm_fp4_version() == _VERSION:
                for name, arguments in _ARGUMENTS.items():
                    getattr(library, name).argtypes = arguments
                for name in ("llm_fp4_selected", "llm_fp4_available"):
                    getattr(library, name).restype = c_char_p
                return library
            problem = f"{spec.origin} belongs to another version of llm-fp4"
        except (OSError, AttributeError) as error:
            problem = f"{spec.origin} does not load: {error}"
    message = "running without compiled CPU kernels, through torch and slower; %s; reinstall llm-fp4"
    logging.getLogger(__name__).warning(message, problem)
    return None


class _Choice:
    """Which kernels run: the library with its best or the named set, or torch."""

    library: ctypes.CDLL | None = None
    made = False


def available() -> list[str]:
    """Return the names of the kernels this machine runs, fastest first; "torch" is always the last."""
    library = _compiled()
    names: list[str] = []
    while library is not None and (name := library.llm_fp4_available(len(names))) is not None:
        names.append(name.decode())
    return [*names, _TORCH]


def select(name: str | None = None) -> str:
    """Return the name of the kernels that run from now on, in the whole process: those of ``name``.

    Args:
        name: one of :func:`available`; None for the environment variable LLM_FP4_KERNEL, or the fastest where it is unset.
    Raises:
        UnsupportedError: this machine runs no kernels of that name.
    """
    name = name or os.environ.get(_VARIABLE) or available()[0]
    if name not in available():
        choices = ", ".join(available())
        raise UnsupportedError(f"no CPU kernels named {name!r} run on this machine; set {_VARIABLE} to one of {choices}")
    _Choice.library = None if name == _TORCH else _compiled()
    _Choice.made = True
    if _Choice.library is not None:
        _Choice.library.llm_fp4_select(name.encode())
    return name


def selected() -> ctypes.CDLL | None:
    """Return the library whose chosen kernels run, or None where torch does the work."""
    if not _Choice.made:
        select()
    return _Choice.library
