"""Exceptions whose message names the thing, the place and the remedy."""

from __future__ import annotations


class LlmFp4Error(Exception):
    """Base of every error a user can mend; the command line prints it without a traceback."""

    exit_code = 1


class RecipeError(LlmFp4Error):
    """A recipe, a bit width, a format or a pattern that cannot be followed."""

    exit_code = 2


class NonFiniteError(LlmFp4Error):
    """A tensor holds NaN or infinity; the message says which, how many and where the first is."""


class SourceError(LlmFp4Error):
    """The float model cannot be read: missing, truncated, corrupt or of a kind not understood."""


class CalibrationError(LlmFp4Error):
    """Calibration or evaluation data is missing, empty, too short or unreadable."""


class CheckpointError(LlmFp4Error):
    """A quantized checkpoint is missing, incomplete, newer than this package or contradicts itself."""


class OutputError(LlmFp4Error):
    """The output cannot be written: it exists already, belongs to another run, or the disk is full."""


class UnsupportedError(LlmFp4Error):
    """A valid request that this version does not implement; the message names the field and value."""


class RankError(LlmFp4Error):
    """Another of the processes that share a run has ended."""
