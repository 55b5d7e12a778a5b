"""Temporary files that a killed process leaves behind only until the next one comes."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path

try:
    import fcntl
except ImportError:  # no such locks on this system: names are then tried until one is free
    fcntl = None  # type: ignore[assignment]


class TemporaryFile:
    """A file in the folder of the one it is to become, locked while its process lives.

    Its name follows from the target's, so the next writer of the same target meets what a
    killed one left, finds it unlocked and removes it; one that is locked belongs to a process
    at work, and the next number is taken instead.

    Attributes:
        path: where it is.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor
        self._identity = _identity(os.fstat(descriptor))

    @classmethod
    def claim(cls, target: Path) -> TemporaryFile:
        """An empty temporary file for `target`.

        Raises:
            OSError: the folder does not take a new file.
        """
        stem = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]
        for number in itertools.count():
            path = target.parent / f".amct-{stem}-{number}.tmp"
            while not os.path.lexists(path) or _removed_as_stale(path):
                claimed = cls._create(path)
                if claimed is not None:
                    return claimed
        raise AssertionError("numbers do not end")

    @classmethod
    def _create(cls, path: Path) -> TemporaryFile | None:
        """The new file, or None where another process was faster."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
        try:
            descriptor = os.open(path, flags, 0o666)
        except FileExistsError:
            return None
        _lock(descriptor)
        created = cls(path, descriptor)
        if created._in_place():
            return created
        # Between creating and locking it was taken for a dead process's.
        created.discard()
        return None

    def _in_place(self) -> bool:
        try:
            return _identity(self.path.stat()) == self._identity
        except FileNotFoundError:
            return False

    def fill(self, content: bytes | Callable[[Path], object]) -> int:
        """Write the content and bring it to the disk; returns its size in bytes."""
        assert self._descriptor is not None
        if callable(content):
            content(self.path)
            # The function may have put another file in this one's place.
            with self.path.open("rb+") as file:
                os.fsync(file.fileno())
            found = self.path.stat()
            self._identity = _identity(found)
            return found.st_size
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(self._descriptor, rest[:_AT_ONCE]) :]
        os.fsync(self._descriptor)
        return len(content)

    def discard(self) -> None:
        """Remove the file, unless it has become another, and give up the lock."""
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):
            if self._in_place():
                self.path.unlink()
        os.close(self._descriptor)
        self._descriptor = None


# One write of the system takes no more than 2 GiB.
_AT_ONCE = 1 << 30


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _lock(descriptor: int) -> bool:
    """Whether the file is locked for this process now."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process has it, or the file system knows no locks
        return False
    return True


def _removed_as_stale(path: Path) -> bool:
    """Whether the file was a dead process's and is gone now."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        if not _lock(descriptor) or _identity(path.lstat()) != _identity(os.fstat(descriptor)):
            return False
        path.unlink()
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
