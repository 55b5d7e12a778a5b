"""Reading and writing the user's files: whole or not at all, with errors that name them."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import uuid
from collections.abc import Callable
from pathlib import Path

from amct_pytorch.errors import (
    AmctError,
    ArgumentTypeError,
    ArgumentValueError,
    ConfigError,
    FileAccessError,
    FileMissingError,
    shown,
)

PathLike = str | os.PathLike[str]

logger = logging.getLogger("amct_pytorch")


def as_path(path: PathLike, what: str) -> Path:
    """`path` as a Path.

    Args:
        path: str or os.PathLike of one.
        what: the argument's name, for messages.

    Raises:
        ArgumentTypeError: it is neither.
        ArgumentValueError: it is empty, names a folder by a final separator, or holds a null
            character.
    """
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str):
        raise ArgumentTypeError(
            f"{what} is of type {type(path).__name__}; allowed are str and os.PathLike[str]"
        )
    if not text or text.endswith(("/", os.sep)) or "\0" in text:
        raise ArgumentValueError(f"{what} is {shown(text)}; it must name a file")
    return Path(text)


def check_writable(path: PathLike, what: str) -> Path:
    """Find out whether a file could be written, without creating anything.

    Called before long work, so that nobody waits an hour for "permission denied".

    Args:
        path: the file to be written later; it and its folders need not exist.
        what: the argument's name, for messages.

    Returns:
        `path` as a Path.

    Raises:
        ArgumentTypeError: see `as_path`.
        ArgumentValueError: see `as_path`.
        FileAccessError: `path` is a folder or a special file, one of its parents is a file,
            or the file or the nearest existing folder is not writable.
    """
    checked = as_path(path, what)
    try:
        obstacle = _obstacle(Path(os.path.realpath(checked)))
    except OSError as error:
        obstacle = error.strerror or str(error)
    if obstacle:
        raise FileAccessError(f"{what}: cannot write {str(checked)!r}: {obstacle}")
    return checked


def _obstacle(target: Path) -> str | None:
    """What keeps a file from being written at `target`, or None."""
    try:
        mode = target.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        folder = target.parent
        while not os.path.lexists(folder):  # False too for what lies below a file
            folder = folder.parent
    else:
        if stat.S_ISDIR(mode):
            return "it is a folder"
        if not stat.S_ISREG(mode):
            return "it is not a regular file"
        if not os.access(target, os.W_OK):
            return "the file is read-only"
        folder = target.parent
    if not folder.is_dir():
        return f"{str(folder)!r} is a file, not a folder"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"the folder {str(folder)!r} is not writable"
    return None


def _temporary_name() -> str:
    return f".amct-{uuid.uuid4().hex}.tmp"


def write_whole(
    path: PathLike,
    content: bytes | Callable[[Path], object],
    *,
    what: str = "path",
    announce: bool = True,
) -> None:
    """Write a file whole or not at all, over an existing one if need be.

    The content goes to a temporary file in the same folder, reaches the disk, and takes the
    final name in one step. Parent folders are created. A link is followed. On any failure
    the temporary file is removed and an existing file stays as it was.

    Args:
        path: the file to write.
        content: its bytes, or a function that is given a path and writes the file there.
        what: the argument's name, for messages.
        announce: whether to log a warning that names an existing file before it is
            overwritten; flows that rewrite their own file pass False.

    Raises:
        ArgumentTypeError: see `as_path`.
        ArgumentValueError: see `as_path`.
        FileAccessError: see `check_writable`, or the disk refuses (full, …).
    """
    checked = check_writable(path, what)
    target = Path(os.path.realpath(checked))
    temporary = target.parent / _temporary_name()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _write(temporary, content)
        existed = target.exists()
        if existed:
            shutil.copymode(target, temporary)
        temporary.replace(target)
        if existed and announce:
            logger.warning("overwrote the existing file %s", checked)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, AmctError):
            raise
        reason = error.strerror or str(error)
        raise FileAccessError(f"{what}: cannot write {str(checked)!r}: {reason}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write(temporary: Path, content: bytes | Callable[[Path], object]) -> None:
    if callable(content):
        content(temporary)
    else:
        temporary.write_bytes(content)
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())


def read_text(path: PathLike, what: str, *, error: type[AmctError] = ConfigError) -> str:
    """The text of a UTF-8 file (a byte-order mark is dropped).

    Args:
        path: the file to read.
        what: the argument's name, for messages.
        error: class of the error for a file that is not UTF-8.

    Raises:
        ArgumentTypeError: see `as_path`.
        ArgumentValueError: see `as_path`.
        FileMissingError: there is no such file.
        FileAccessError: it is a folder, or cannot be read.
        AmctError: of class `error`; the content is not UTF-8.
    """
    checked = as_path(path, what)
    try:
        data = checked.read_bytes()
    except FileNotFoundError:
        raise FileMissingError(f"{what}: there is no file {str(checked)!r}") from None
    except OSError as caught:
        reason = caught.strerror or str(caught)
        raise FileAccessError(f"{what}: cannot read {str(checked)!r}: {reason}") from caught
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as caught:
        line = data[: caught.start].count(b"\n") + 1
        raise error(f"{checked}: line {line}: not UTF-8 text ({caught.reason})") from None


def check_distinct(**paths: PathLike) -> None:
    """Checks that arguments name different files, links followed.

    Args:
        paths: path by argument name.

    Raises:
        ArgumentValueError: two are the same file; the later argument would overwrite it.
    """
    seen: dict[str, str] = {}
    for what, path in paths.items():
        real = os.path.realpath(as_path(path, what))
        if real in seen:
            raise ArgumentValueError(
                f"{what} and {seen[real]} are the same file, {str(path)!r}; give different ones"
            )
        seen[real] = what
