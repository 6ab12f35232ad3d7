"""While a library call runs: progress on stderr, other libraries silent, stdout kept clean."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import sys
import warnings
from collections.abc import Iterator

from llm_fp4.cli.bars import Bars, Lines
from llm_fp4.progress import Progress, silent


@contextlib.contextmanager
def working(quiet: bool) -> Iterator[Progress]:
    """Yield the progress callback of a library call: bars on a terminal, sparse lines elsewhere, nothing when ``quiet``.

    Whatever other libraries print meanwhile goes to stderr, and their own bars, logs and warnings are off.
    """
    with _others_silent(), contextlib.redirect_stdout(sys.stderr):
        if quiet:
            yield silent
        elif sys.stderr.isatty():
            with Bars() as bars:
                yield bars
        else:
            yield Lines()


@contextlib.contextmanager
def _others_silent() -> Iterator[None]:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    tqdm = importlib.import_module("tqdm.std").tqdm
    draw, disabled, hub = tqdm.__init__, logging.root.manager.disable, are_progress_bars_disabled()
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    try:
        logging.disable(logging.WARNING)
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        disable_progress_bars()
        # dequantizing a GGUF draws a bar that none of these settings reaches
        tqdm.__init__ = functools.partialmethod(draw, disable=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        tqdm.__init__ = draw
        logging.disable(disabled)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        if not hub:
            enable_progress_bars()
