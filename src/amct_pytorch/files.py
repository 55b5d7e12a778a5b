"""Reading and writing the user's files: whole or not at all, with errors that name them."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
from amct_pytorch.temporary import TemporaryFile

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


class WholeFiles:
    """Files that take their places together, each whole, or not at all.

    The content of each goes to a temporary file in its folder and reaches the disk. Only when
    the block ends well do all take their final names, one step a file; on any failure before
    that the temporary files are removed and existing files stay as they were. Parent folders
    are created. A link is followed.

    A process killed in between leaves temporary files (``.amct-*.tmp``); the next write of the
    same file removes them.

    Example::

        with WholeFiles() as files:
            files.write("model.onnx", data)
            files.write("record.txt", text)
    """

    def __init__(self) -> None:
        self._staged: list[_Staged] = []
        self._retired: list[Path] = []

    def __enter__(self) -> WholeFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            for staged in self._staged:
                staged.temporary.discard()

    def write(
        self,
        path: PathLike,
        content: bytes | Callable[[Path], object],
        *,
        what: str = "path",
        announce: bool = True,
    ) -> int:
        """Write a file under its temporary name.

        Args:
            path: the file to write.
            content: its bytes, or a function that is given a path and writes the file there.
            what: the argument's name, for messages.
            announce: whether to log a warning that names an existing file when it is
                overwritten; flows that rewrite their own file pass False.

        Returns:
            The size in bytes.

        Raises:
            ArgumentTypeError: see `as_path`.
            ArgumentValueError: see `as_path`.
            FileAccessError: see `check_writable`, or the disk refuses (full, …).
        """
        checked = check_writable(path, what)
        target = Path(os.path.realpath(checked))
        with _told(what, checked):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = TemporaryFile.claim(target)
            self._staged.append(_Staged(temporary, target, checked, what, announce))
            size = temporary.fill(content)
            if target.exists():
                shutil.copymode(target, temporary.path)
        return size

    def retire(self, path: PathLike) -> None:
        """Have a file removed just before the new ones take their places.

        For a file that would be wrong beside some of them, an ONNX model beside another's
        tensors: better none for a moment than a wrong one for good.
        """
        self._retired.append(Path(os.path.realpath(path)))

    def _commit(self) -> None:
        existed = [staged.target.exists() for staged in self._staged]
        with interrupts_wait():
            for path in self._retired:
                with _told("path", path):
                    path.unlink(missing_ok=True)
            for staged in self._staged:
                with _told(staged.what, staged.shown):
                    staged.temporary.path.replace(staged.target)
        for staged, before in zip(self._staged, existed, strict=True):
            if before and staged.announce:
                logger.warning("overwrote the existing file %s", staged.shown)


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """Ctrl-C and SIGTERM take effect when the block has ended.

    For a few renames that belong together. Only the main thread gets signals; elsewhere this does
    nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler is not None:  # None: it is not Python's to change
            signal.signal(number, lambda found, _: came.append(found))
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


@dataclass(frozen=True)
class _Staged:
    """A file that waits under its temporary name."""

    temporary: TemporaryFile
    target: Path
    shown: Path
    what: str
    announce: bool


@contextlib.contextmanager
def _told(what: str, path: Path) -> Iterator[None]:
    """Turns the system's errors into one that names the argument and the file."""
    try:
        yield
    except AmctError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileAccessError(f"{what}: cannot write {str(path)!r}: {reason}") from error


def write_whole(
    path: PathLike,
    content: bytes | Callable[[Path], object],
    *,
    what: str = "path",
    announce: bool = True,
) -> None:
    """Write one file whole or not at all, over an existing one if need be.

    Args:
        path: see `WholeFiles.write`, like the other arguments.
        content: see there.
        what: see there.
        announce: see there.

    Raises:
        ArgumentTypeError, ArgumentValueError, FileAccessError: see there.
    """
    with WholeFiles() as files:
        files.write(path, content, what=what, announce=announce)


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


def text_kind(head: bytes) -> str | None:
    """Which text a file seems to hold, by its first bytes.

    Args:
        head: as many as are at hand; the last letter may be cut.

    Returns:
        ``JSON`` (an object or a list), ``text`` (any other), or None: it is no text.
    """
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:
            return None
        text = head[: error.start].decode("utf-8-sig")
    if not all(letter.isprintable() or letter in "\n\r\t" for letter in text):
        return None
    return "JSON" if text.lstrip()[:1] in ("{", "[") else "text"


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
