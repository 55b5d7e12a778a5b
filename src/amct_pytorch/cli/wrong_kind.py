"""Errors about a file of another kind than the argument takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from amct_pytorch.errors import AmctError, ConfigError, ExportError

ONNX_KINDS = ("QDQ", "deploy", "fake-quant", "float ONNX", "modified")


@contextmanager
def kind_told(path: Path, what: str, wanted: str, kinds: tuple[str, ...]) -> Iterator[None]:
    """Errors about what a file holds say what it is, where it is a known file of another kind.

    Args:
        path: the file.
        what: the argument's name.
        wanted: what the file should be, with its article.
        kinds: how the kinds begin whose errors stay as they are.
    """
    from amct_pytorch.cli.contents import contents_of

    try:
        yield
    except (ConfigError, ExportError) as error:
        try:
            kind = contents_of(path).kind
        except AmctError:
            raise error from None
        if kind.startswith(kinds):
            raise
        article = "an" if kind[0] in "aeiou" else "a"
        raise type(error)(f"{what}: {str(path)!r} is {article} {kind}, not {wanted}") from error
