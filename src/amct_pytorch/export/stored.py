"""Models whose large tensors stay in their file until somebody reads them.

An initializer that was left out stands in the model as a stub: external data at an absolute
place, which no ONNX file may have. Files that a model names itself are read by onnx alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import onnx
from onnx import TensorProto

from amct_pytorch.errors import ExportError

# Smaller tensors are read with the model.
SMALLEST_STORED = 1024
_GRAPH = onnx.ModelProto.GRAPH_FIELD_NUMBER
_INITIALIZER = onnx.GraphProto.INITIALIZER_FIELD_NUMBER
_RAW_DATA = TensorProto.RAW_DATA_FIELD_NUMBER
# What a stub has beside the entries that ONNX knows: which version of the file it is of.
_VERSION = "amct.version"
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class NotPlainError(Exception):
    """A file that is not laid out as protobuf's encoding guide says; protobuf tells why."""


@dataclass(frozen=True)
class StoredModel:
    """A model without the data of its large initializers.

    Attributes:
        model: their `raw_data` is missing.
        places: first byte and number of bytes of what is missing, by number of the initializer.
        version: of the file, see `with_data`.
    """

    model: onnx.ModelProto
    places: dict[int, tuple[int, int]]
    version: str


@dataclass(frozen=True)
class _Field:
    number: int
    wire: int
    begin: int  # of its tag
    value: int
    end: int


def read_stored(path: Path) -> StoredModel:
    """A model file, but for the data of its large initializers.

    Raises:
        OSError: the file cannot be read.
        NotPlainError: it is laid out in a way that is not looked into here.
        google.protobuf.message.DecodeError: it holds no ONNX model.
    """
    places: dict[int, tuple[int, int]] = {}
    rest = bytearray()
    tensors = 0
    with path.open("rb") as file:
        stat = os.fstat(file.fileno())
        for field in _fields(file, 0, stat.st_size):
            if (field.number, field.wire) != (_GRAPH, _BYTES):
                rest += _content(file, field.begin, field.end)
                continue
            graph = bytearray()
            for part in _fields(file, field.value, field.end):
                if (part.number, part.wire) != (_INITIALIZER, _BYTES):
                    graph += _content(file, part.begin, part.end)
                    continue
                tensor = bytearray()
                for piece in _fields(file, part.value, part.end):
                    size = piece.end - piece.value
                    raw = (piece.number, piece.wire) == (_RAW_DATA, _BYTES)
                    if raw and size >= SMALLEST_STORED:
                        if tensors in places:
                            raise NotPlainError
                        places[tensors] = (piece.value, size)
                    else:
                        tensor += _content(file, piece.begin, piece.end)
                graph += mark(_INITIALIZER, len(tensor)) + tensor
                tensors += 1
            rest += mark(_GRAPH, len(graph)) + graph
    return StoredModel(onnx.ModelProto.FromString(bytes(rest)), places, _version(stat))


def put_stubs(stored: StoredModel, path: Path) -> None:
    """Makes stubs of the initializers whose data is missing, in place."""
    for number, (begin, size) in stored.places.items():
        tensor = stored.model.graph.initializer[number]
        if tensor.HasField("raw_data"):  # it had external data too
            continue
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (
            ("location", str(path.absolute())),
            ("offset", str(begin)),
            ("length", str(size)),
            (_VERSION, stored.version),
        ):
            tensor.external_data.add(key=key, value=value)


def is_stub(tensor: TensorProto) -> bool:
    """Whether a tensor's data is still in its file."""
    return any(entry.key == _VERSION for entry in tensor.external_data)


def stored_bytes(tensor: TensorProto) -> int:
    """Bytes of a tensor's data, wherever it is."""
    if is_stub(tensor):
        return int(_entries(tensor)["length"])
    return len(tensor.raw_data) if tensor.HasField("raw_data") else int(tensor.ByteSize())


def with_data(tensor: TensorProto) -> TensorProto:
    """The tensor with its data: itself, or for a stub a new one, read from the file.

    Raises:
        ExportError: the file is no longer the one that the model was read from.
    """
    if not is_stub(tensor):
        return tensor
    whole = _without_data(tensor)
    whole.raw_data = _data(tensor)
    return whole


def wire_size(tensor: TensorProto) -> int:
    """Bytes of a tensor with its data as a message."""
    if not is_stub(tensor):
        return int(tensor.ByteSize())
    size = stored_bytes(tensor)
    return int(_without_data(tensor).ByteSize()) + len(mark(_RAW_DATA, size)) + size


def wire_parts(tensor: TensorProto) -> Iterator[bytes]:
    """A tensor with its data as a message, part by part.

    Raises:
        ExportError: see `with_data`.
    """
    if not is_stub(tensor):
        yield tensor.SerializeToString()
        return
    yield _without_data(tensor).SerializeToString()
    yield mark(_RAW_DATA, stored_bytes(tensor))
    yield _data(tensor)


def _without_data(stub: TensorProto) -> TensorProto:
    tensor = TensorProto()
    tensor.CopyFrom(stub)
    tensor.ClearField("data_location")
    del tensor.external_data[:]
    return tensor


def _data(stub: TensorProto) -> bytes:
    place = _entries(stub)
    path, begin, size = place["location"], int(place["offset"]), int(place["length"])
    try:
        with Path(path).open("rb") as file:
            if _version(os.fstat(file.fileno())) != place[_VERSION]:
                raise ExportError(f"{path!r} was changed while it was being read; try again")
            return _content(file, begin, begin + size)
    except (OSError, NotPlainError) as error:
        raise ExportError(f"{path!r} cannot be read any more: {error}") from error


def with_all_data(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model itself where it has no stubs, else a copy with all its data."""
    if not any(is_stub(tensor) for tensor in model.graph.initializer):
        return model
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    for tensor in whole.graph.initializer:
        if is_stub(tensor):
            tensor.CopyFrom(with_data(tensor))
    return whole


def mark(field: int, length: int) -> bytes:
    """Tag of a length-delimited field, and its length, both as varints."""
    encoded = bytearray()
    for value in (field << 3 | _BYTES, length):
        while value > 0x7F:
            encoded.append(value & 0x7F | 0x80)
            value >>= 7
        encoded.append(value)
    return bytes(encoded)


def _entries(tensor: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _version(stat: os.stat_result) -> str:
    return f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns}"


def _fields(file: BinaryIO, position: int, end: int) -> Iterator[_Field]:
    """The fields of the message in a part of a file."""
    while position < end:
        begin = position
        tag, position = _varint(file, position)
        number, wire = tag >> 3, tag & 7
        value = position
        if wire == _VARINT:
            _, position = _varint(file, position)
        elif wire == _BYTES:
            length, value = _varint(file, position)
            position = value + length
        elif wire in (_FIXED64, _FIXED32):
            position += 8 if wire == _FIXED64 else 4
        else:
            raise NotPlainError
        if position > end or number == 0:
            raise NotPlainError
        yield _Field(number, wire, begin, value, position)


def _varint(file: BinaryIO, position: int) -> tuple[int, int]:
    """The number at a position, and where it ends."""
    file.seek(position)
    value = 0
    for i, byte in enumerate(file.read(10)):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, position + i + 1
    raise NotPlainError


def _content(file: BinaryIO, begin: int, end: int) -> bytes:
    file.seek(begin)
    data = file.read(end - begin)
    if len(data) != end - begin:
        raise NotPlainError
    return data
