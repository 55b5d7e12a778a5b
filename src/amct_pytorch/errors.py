"""Errors that a user can do something about, and the words they are told in.

Every such error is an `AmctError` and also the built-in class a script would catch for it.
Anything else that escapes from the toolkit is a defect of the toolkit.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AmctError(Exception):
    """Base of all errors whose cause lies in what the user gave."""


class ArgumentTypeError(AmctError, TypeError):
    """An argument has the wrong type."""


class ArgumentValueError(AmctError, ValueError):
    """An argument has the right type and a value that is not allowed."""


class ConfigError(AmctError, ValueError):
    """A config file, or the config in it, is wrong."""


class RecordError(AmctError, ValueError):
    """A record file is wrong, incomplete, or does not fit the model."""


class FileMissingError(AmctError, FileNotFoundError):
    """A file that should be read is not there."""


class FileAccessError(AmctError, OSError):
    """A file or folder cannot be read or written."""


class ModelError(AmctError, RuntimeError):
    """The model cannot be run, seen, copied or quantized."""


class CalibrationError(AmctError, RuntimeError):
    """Calibration got data it cannot use, or not enough of it."""


class ExportError(AmctError, RuntimeError):
    """The model, or an ONNX file, cannot be turned into the file asked for."""


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` with the nearest of `candidates`, or an empty string."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
