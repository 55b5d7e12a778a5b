"""The record file: quantization factors by layer, and what other flows keep beside them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from amct_pytorch.errors import ProblemList, RecordError, did_you_mean, shown
from amct_pytorch.files import PathLike, WholeFiles, read_text, text_kind
from amct_pytorch.proto import ScaleOffsetRecord
from amct_pytorch.proto.text import parse_text, print_text
from amct_pytorch.record.entry import check_factors, factors_of, fill_entry
from amct_pytorch.record.factors import LayerFactors


@dataclass
class RecordFile:
    """What a record file holds.

    Attributes:
        factors: by layer name, in the file's order. Change it and write the record again.
        source: the file it was read from, for messages; empty for a new record.
        message: the file as it was read. What the toolkit does not put into `factors`
            (pruning, KV cache, recurrent layers) goes from here into the file written next.
        plain_types: whether entries written say ``INT8``, which is what a reader takes it for
            where it is left out.
    """

    factors: dict[str, LayerFactors] = field(default_factory=dict)
    source: str = ""
    message: ScaleOffsetRecord = field(default_factory=ScaleOffsetRecord, repr=False)
    plain_types: bool = True

    def check_keys(self, layer_names: Iterable[str]) -> None:
        """Find entries for layers that the model does not have.

        KV-cache entries are not looked at: their names are the user's own.

        Args:
            layer_names: names of the model's layers.

        Raises:
            RecordError: naming the unknown layers and the nearest name of each.
        """
        known = set(layer_names)
        problems = ProblemList(self.source or "record", RecordError)
        for name in self.factors:
            if name not in known:
                problems.add(f"{name}: the model has no such layer{did_you_mean(name, known)}")
        problems.raise_if_any()


def read_record(path: PathLike) -> RecordFile:
    """Read and check a record file.

    Everything that protobuf's text format allows is accepted: any order, comments, and of an
    optional field given twice the later value. A layer whose factors are incomplete is fine
    here; `LayerFactors.complete` tells.

    Args:
        path: the record file.

    Raises:
        FileMissingError, FileAccessError: the file cannot be read.
        RecordError: it is JSON; the text does not parse (with line and column); or, all of them
            in one error (up to ten): scales or balance factors that are not finite and > 0, offsets
            out of range, as many offset_w as scale_w not given, unknown types, entries
            without a key or with the same key.
    """
    return parse_record(read_text(path, "record_file", error=RecordError), str(path))


def parse_record(text: str, source: str) -> RecordFile:
    """What a record file's text says.

    Args:
        text: of the file.
        source: the file it is from, for messages.

    Raises:
        RecordError: see `read_record`.
    """
    message = ScaleOffsetRecord()
    if text_kind(text[:4096].encode()) == "JSON":  # no record begins with a bracket
        raise RecordError(f"{source} is JSON, not a record of factors")
    parse_text(text, message, source, RecordError, last_wins=True)
    problems = ProblemList(source, RecordError)
    factors: dict[str, LayerFactors] = {}
    seen: set[str] = set()
    for index, entry in enumerate(message.record):
        if not entry.HasField("key"):
            problems.add(f"record[{index}].key is missing; allowed: the name of a layer")
            continue
        if entry.key in seen:
            problems.add(f"record[{index}].key is {shown(entry.key)}, which an earlier entry has")
            continue
        seen.add(entry.key)
        if entry.HasField("value"):
            factors[entry.key] = factors_of(entry.value, _telling(problems, entry.key))
    problems.raise_if_any()
    return RecordFile(factors, source, message)


def write_record(
    path: PathLike, record: RecordFile, *, announce: bool = True, files: WholeFiles | None = None
) -> None:
    """Write a record file whole or not at all.

    Layers stand in the order of `record.factors`; a layer whose factors are still what was
    read keeps its entry untouched. After them come entries that hold other matters only.

    Args:
        path: the file to write.
        record: what to write.
        announce: whether to log a warning when an existing file is overwritten; False for a
            flow that completes its own record.
        files: others that take their places together with this one; None: it goes alone.

    Raises:
        RecordError: factors that the file cannot hold, checked as in `read_record`.
        FileAccessError: the file cannot be written.
    """
    text = record_text(record, str(path)).encode()
    if files is not None:
        files.write(path, text, what="record_file", announce=announce)
        return
    with WholeFiles() as alone:
        alone.write(path, text, what="record_file", announce=announce)


def record_text(record: RecordFile, target: str) -> str:
    """The text that a file of this record holds.

    Args:
        record: what to print.
        target: the file it is for, for messages.

    Raises:
        RecordError: see `write_record`.
    """
    return print_text(_message(record, target))


def _telling(problems: ProblemList, layer_name: str) -> Any:
    return lambda text: problems.add(f"{layer_name}: {text}")


def _message(record: RecordFile, source: str) -> ScaleOffsetRecord:
    problems = ProblemList(source, RecordError)
    entries = {entry.key: entry for entry in record.message.record}
    result = ScaleOffsetRecord()
    for name, factors in record.factors.items():
        entry = result.record.add()
        if name in entries:
            entry.CopyFrom(entries[name])
        entry.key = name
        if entry.HasField("value") and factors_of(entry.value, _ignore) == factors:
            continue
        before = len(problems)
        check_factors(factors, _telling(problems, name))
        if len(problems) == before:
            fill_entry(entry.value, factors, plain_types=record.plain_types)
    problems.raise_if_any()
    for name, entry in entries.items():
        if name not in record.factors:
            left = result.record.add()
            left.CopyFrom(entry)
            left.ClearField("value")
            if not left.HasField("kv_cache_value"):
                del result.record[-1]
    result.prune_record.extend(record.message.prune_record)
    return result


def _ignore(text: str) -> None:
    """Nothing: what was read has been checked."""
