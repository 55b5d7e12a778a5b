"""KV-cache factors in the record file, which several processes may add to at once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amct_pytorch.errors import FileAccessError, ProblemList, RecordError
from amct_pytorch.files import PathLike, as_path, read_text, write_whole
from amct_pytorch.formats import INT8
from amct_pytorch.logs import logger
from amct_pytorch.record.entry import check_positive
from amct_pytorch.record.record_file import RecordFile, parse_record, read_record, record_text

try:
    import fcntl
except ImportError:  # no such locks on this system: one process at a time then
    fcntl = None  # type: ignore[assignment]


@dataclass(frozen=True)
class KvFactors:
    """Factors of one cached tensor: int8 = clip(round(x / scale) + offset).

    Attributes:
        scale: one value, or one per channel.
        offset: as many, in [-128, 127].
    """

    scale: tuple[float, ...]
    offset: tuple[int, ...]


def read_kv_factors(path: PathLike) -> dict[str, KvFactors]:
    """The KV-cache factors of a record file, by name.

    Args:
        path: the record file.

    Raises:
        FileMissingError, FileAccessError: the file cannot be read.
        RecordError: see `read_record`; or a scale is not finite and > 0, an offset is out of
            range, or there are not as many of the one as of the other.
    """
    return _factors(read_record(path))


def _factors(record: RecordFile) -> dict[str, KvFactors]:
    problems = ProblemList(record.source or "record", RecordError)
    found = {}
    for entry in record.message.record:
        if entry.HasField("kv_cache_value"):
            value = entry.kv_cache_value
            factors = KvFactors(tuple(value.scale), tuple(value.offset))
            _check(entry.key, factors, problems)
            found[entry.key] = factors
    problems.raise_if_any()
    return found


def _check(name: str, factors: KvFactors, problems: ProblemList) -> None:
    place = f"{name}.kv_cache_value"
    check_positive("scale", factors.scale, lambda text: problems.add(f"{place}.{text}"))
    if not factors.scale or len(factors.scale) != len(factors.offset):
        problems.add(
            f"{place} has {len(factors.scale)} scale and {len(factors.offset)} offset values; "
            "allowed: equally many, at least one"
        )
    for index, offset in enumerate(factors.offset):
        if not INT8.qmin <= offset <= INT8.qmax:
            problems.add(
                f"{place}.offset[{index}] is {offset}; allowed: {INT8.qmin} to {INT8.qmax}"
            )
            break


# The file that was written last, its text and what that says: an operator adds to one record once
# for every tensor, and parsing is by far the slowest part of that.
_last_written: tuple[Path, str, RecordFile] | None = None


def _read(target: Path) -> RecordFile:
    if not target.exists():
        return RecordFile(source=str(target))
    text, last = read_text(target, "record_file", error=RecordError), _last_written
    if last is not None and last[:2] == (target, text):
        return last[2]
    return parse_record(text, str(target))


def add_kv_factors(path: PathLike, factors: Mapping[str, KvFactors]) -> None:
    """Adds factors to a record file, which need not exist; all else in it stays.

    The file is locked from reading to writing, so that writers in several threads and
    processes lose nothing of each other's, and is replaced whole. Factors that were there
    under the same name are overwritten, with a line in the log that names them.

    Args:
        path: the record file.
        factors: by name.

    Raises:
        FileAccessError: the file cannot be read or written.
        RecordError: what is there is no sound record; it is left as it is.
    """
    global _last_written
    target = as_path(path, "record_file")
    problems = ProblemList("KV-cache factors", RecordError)
    for name, found in factors.items():
        _check(name, found, problems)
    problems.raise_if_any()
    with _locked(target):
        record = _read(target)
        known = _factors(record)
        # Whatever goes wrong from here leaves the message changed and the file not.
        _last_written = None
        entries = {entry.key: entry for entry in record.message.record}
        for name, found in factors.items():
            entry: Any = entries.get(name)
            if entry is None:
                entry = record.message.record.add()
                entry.key = name
            entry.kv_cache_value.Clear()
            entry.kv_cache_value.scale.extend(found.scale)
            entry.kv_cache_value.offset.extend(found.offset)
        text = record_text(record, str(target))
        write_whole(target, text.encode(), what="record_file", announce=False)
        _last_written = (target, text, record)
    overwritten = [name for name in factors if name in known]
    if overwritten:
        logger.warning("%s: overwrote the KV-cache factors of %s", path, ", ".join(overwritten))


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Holds the lock of the target's folder, which a process gives back even when killed.

    The record itself cannot carry the lock: it is replaced by another file.
    """
    if fcntl is None:
        yield
        return
    folder = Path(os.path.realpath(target)).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileAccessError(f"record_file: cannot write {str(target)!r}: {reason}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("%s cannot be locked: %s", folder, error.strerror or error)
        yield
    finally:
        os.close(descriptor)
