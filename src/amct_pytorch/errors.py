"""Errors that a user can do something about, and the words they are told in.

Every such error is an `AmctError` and also the built-in class a script would catch for it.
Anything else that escapes from the toolkit is a defect of the toolkit.
"""

from __future__ import annotations

import difflib
import json
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


class PackageMissingError(AmctError, ImportError):
    """A package that is not among the toolkit's own requirements is not installed."""


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` with the nearest of `candidates`, or an empty string."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    # Equal only in letters: the text "false" where false is allowed.
    return f" (did you mean {close[0]!r}?)" if close and close[0] != name else ""


def shown(value: object) -> str:
    """`value` as it would stand in a JSON file, shortened to fit on a line."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


class ProblemList:
    """Collects what is wrong with one file, so that one error can tell all of it.

    Args:
        source: the file's name, or another name for where the problems are.
        error: class of the error that `raise_if_any` raises.
    """

    LIMIT = 10

    def __init__(self, source: str, error: type[AmctError]) -> None:
        self._source = source
        self._error = error
        self._texts: list[str] = []

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, text: str) -> None:
        """Note one problem; `text` begins with the place and needs no full stop."""
        self._texts.append(text)

    def raise_if_any(self) -> None:
        """Raise one error with up to `LIMIT` of the problems, and how many more there are."""
        if not self._texts:
            return
        if len(self._texts) == 1:
            raise self._error(f"{self._source}: {self._texts[0]}")
        lines = [f"{self._source}: {len(self._texts)} problems", *self._texts[: self.LIMIT]]
        if len(self._texts) > self.LIMIT:
            lines.append(f"and {len(self._texts) - self.LIMIT} more")
        raise self._error("\n  ".join(lines))
