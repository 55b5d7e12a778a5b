"""A folder in which files are made that take their places together, or not at all."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from amct_pytorch.errors import FileAccessError
from amct_pytorch.files import WholeFiles
from amct_pytorch.logs import logger

try:
    import fcntl
except ImportError:  # no such locks on this system: what a killed process leaves stays
    fcntl = None  # type: ignore[assignment]

_PREFIX = ".amct-work-"
_LOCK = ".lock"


class _FinalNames(logging.Filter):
    """Makes log lines name files as they will be called."""

    def __init__(self, staged: Path, target: Path) -> None:
        super().__init__()
        self._staged, self._target = str(staged), str(target)

    def filter(self, record: logging.LogRecord) -> bool:
        """Every record, changed where it names the temporary folder."""
        text = record.getMessage()
        if self._staged in text:
            record.msg, record.args = text.replace(self._staged, self._target), ()
        return True


class Staging:
    """A temporary folder beside the files that it is to give.

    Whatever ends the block, Ctrl-C too, the folder is gone afterwards; what a killed process left
    is removed by the next one that works in the same place.

    Args:
        target: the folder that the files will go to; it is made by `publish`.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self._descriptor: int | None = None
        self.path = target

    def __enter__(self) -> Staging:
        place = self._target.absolute()
        while not os.path.lexists(place):
            place = place.parent
        if not place.is_dir():
            raise FileAccessError(f"--out: {str(place)!r} is a file, not a folder")
        _remove_stale(place)
        try:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
        except OSError as error:
            raise FileAccessError(
                f"--out: cannot write in {str(place)!r}: {error.strerror or error}"
            ) from error
        self._descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT)
        if fcntl is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._names = _FinalNames(self.path, self._target)
        # First: the log's own filter hands lines on.
        logger.filters.insert(0, self._names)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
        logger.removeFilter(self._names)
        shutil.rmtree(self.path, ignore_errors=True)

    def publish(self, owned: Iterable[str] = ()) -> tuple[list[Path], list[Path]]:
        """Gives every file in the folder its place.

        Args:
            owned: names of external data files that belong to models which are replaced.

        Returns:
            The files, and which of them were there before.

        Raises:
            FileAccessError: a file cannot be written, or another model's external data has its
                name.
        """
        staged = sorted(file for file in self.path.iterdir() if file.name != _LOCK)
        targets = [self._target / file.name for file in staged]
        replaced = [target for target in targets if target.exists()]
        mine = set(owned)
        for target in replaced:
            if target.suffix == ".external" and target.name not in mine:
                raise FileAccessError(
                    f"--out: {str(target)!r} is there and may belong to another model; choose "
                    "another folder"
                )
        with WholeFiles() as files:
            for source, target in zip(staged, targets, strict=True):
                files.write(target, source.replace, what="--out", announce=False)
        return targets, replaced


def _remove_stale(place: Path) -> None:
    """Removes the folders that killed processes left."""
    if fcntl is None:
        return
    for folder in place.glob(f"{_PREFIX}*"):
        try:
            descriptor = os.open(folder / _LOCK, os.O_RDWR)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # at work
        else:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)
