"""ONNX files: read with clear errors, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, checker, external_data_helper, numpy_helper

from amct_pytorch.errors import ExportError, FileAccessError, FileMissingError
from amct_pytorch.export.onnx_check import check_graph
from amct_pytorch.export.stored import (
    NotPlainError,
    StoredModel,
    mark,
    put_stubs,
    read_stored,
    stored_bytes,
    wire_parts,
    wire_size,
    with_data,
)
from amct_pytorch.files import PathLike, WholeFiles, as_path, check_writable, text_kind

# Protobuf cannot hold 2 GiB in one message. This counts tensors; names and nodes come on top.
LARGEST_FILE = (1 << 31) - (1 << 24)
# Smaller tensors stay in the model file: runtimes read shapes and scalars from there.
SMALLEST_EXTERNAL = 1024


def load_onnx(path: PathLike, what: str = "path", *, tensors_stay: bool = False) -> onnx.ModelProto:
    """The model in a file, its external data included.

    Args:
        path: an ONNX file.
        what: the argument's name, for messages.
        tensors_stay: whether large initializers stay in the file, as stubs that `OnnxGraph` and
            `save_onnx` know (see `export.stored`). The file must not change meanwhile.

    Raises:
        ArgumentTypeError, ArgumentValueError: `path` is no path of a file.
        FileMissingError: there is no such file, or not its external data.
        FileAccessError: it cannot be read.
        ExportError: it is no ONNX model, or a damaged one.
    """
    file = as_path(path, what)
    if not os.path.lexists(file):  # no error for a name too long
        raise FileMissingError(f"{what}: there is no file {str(file)!r}")
    if not os.path.isfile(file):  # noqa: PTH113 (the same)
        raise FileAccessError(f"{what}: {str(file)!r} is a folder; an ONNX file is needed")
    try:
        stored = _stored(file, tensors_stay=tensors_stay)
    except OSError as error:
        raise FileAccessError(f"{what}: ONNX file {str(file)!r} cannot be read: {error}") from error
    except Exception as error:
        text = _text_kind(file)
        if text == "JSON":
            raise ExportError(f"{what}: {str(file)!r} is JSON, not an ONNX model") from error
        # What is behind the first line lists the fields of a protocol buffer.
        why = "it is text" if text else str(error).partition("\n")[0]
        raise ExportError(f"{what}: {str(file)!r} is not a readable ONNX model: {why}") from error
    model = stored.model
    if not model.HasField("graph") or not model.opset_import:
        raise ExportError(
            f"{what}: {str(file)!r} is not an ONNX model: it has no graph or no opset"
        )
    try:
        external_data_helper.load_external_data_for_model(model, str(file.parent))
    except (OSError, ValueError, OverflowError, checker.ValidationError) as error:
        raise FileMissingError(
            f"{what}: ONNX file {str(file)!r}: its external data cannot be read: {error}"
        ) from error
    for tensor in model.graph.initializer:
        del tensor.external_data[:]  # read by now, or of no meaning: nothing else is a stub
    put_stubs(stored, file)
    check_graph(model, f"{what}: {str(file)!r}")
    return model


def _text_kind(file: Path) -> str | None:
    with file.open("rb") as opened:
        return text_kind(opened.read(4096))


def _stored(file: Path, *, tensors_stay: bool) -> StoredModel:
    if tensors_stay:
        with contextlib.suppress(NotPlainError):
            return read_stored(file)
    return StoredModel(onnx.load(str(file), load_external_data=False), {}, "")


def save_onnx(
    model: onnx.ModelProto,
    path: PathLike,
    *,
    what: str = "path",
    announce: bool = True,
    external_suffix: str | None = None,
    largest_file: int | None = None,
    files: WholeFiles | None = None,
) -> int:
    """Write a model whole or not at all; parent folders are made, an old file is replaced.

    A model whose tensors have `largest_file` bytes or more goes with one external data file per
    tensor beside it: ``<model>_<tensor>.external``, or the tensor's name with `external_suffix`.
    A file of that name which does not belong to the model that is replaced (another model's, in
    the same folder) is left alone; the tensor's name gets a number then. A replaced model file
    is named in the log. While tensors beside it are exchanged there is no model file, so none
    ever reads another's tensors.

    Args:
        model: the model; not changed.
        path: where to.
        what: the argument's name, for messages.
        announce: whether a replaced file is named in the log.
        external_suffix: ``_deploy.external``, ``_fakequant.external``, or empty; None: names
            begin with the model's own.
        largest_file: bytes from which on the model is split; default: `LARGEST_FILE`.
        files: others that take their places together with this one; None: it goes alone.

    Returns:
        Bytes written, external data included.

    Raises:
        ArgumentTypeError, ArgumentValueError: `path` is no path of a file.
        FileAccessError: a folder cannot be made or a file cannot be written; no new file is
            left then.
    """
    if files is None:
        with WholeFiles() as files:
            return save_onnx(
                model,
                path,
                what=what,
                announce=announce,
                external_suffix=external_suffix,
                largest_file=largest_file,
                files=files,
            )
    file = check_writable(path, what)
    parts: dict[str, TensorProto] = {}
    size = sum(stored_bytes(tensor) for tensor in model.graph.initializer)
    if size >= (LARGEST_FILE if largest_file is None else largest_file):
        model, parts = _split(model, external_suffix, file)
    for name in parts:
        check_writable(file.parent / name, what)
    written = 0
    for name, tensor in parts.items():
        written += files.write(file.parent / name, _raw_data(tensor), what=what, announce=False)
    if parts:
        files.retire(file)
    return written + files.write(
        file, lambda target: _write(model, target), what=what, announce=announce
    )


def size_on_disk(path: PathLike) -> int:
    """Bytes of a model's file and of its external data."""
    file = Path(path)
    parts = (file.parent / name for name in data_files(file))
    return file.stat().st_size + sum(part.stat().st_size for part in parts)


def _write(model: onnx.ModelProto, target: Path) -> None:
    """Writes the message one tensor at a time: serialized as a whole, it would be there twice.

    On the wire a message is its fields one after the other, in any order, and a field that is a
    message is a tag, the number of its bytes, and these (protobuf's encoding guide).
    """
    head, graph = onnx.ModelProto(), onnx.GraphProto()
    _copy_fields(model, head, but="graph")
    _copy_fields(model.graph, graph, but="initializer")
    tensors = model.graph.initializer
    sizes = [wire_size(tensor) for tensor in tensors]
    marks = [mark(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, size) for size in sizes]
    length = graph.ByteSize() + sum(sizes) + sum(map(len, marks))
    with target.open("wb") as file:
        file.write(head.SerializeToString())
        file.write(mark(onnx.ModelProto.GRAPH_FIELD_NUMBER, length))
        file.write(graph.SerializeToString())
        for start, tensor in zip(marks, tensors, strict=True):
            file.write(start)
            file.writelines(wire_parts(tensor))


def _split(
    model: onnx.ModelProto, suffix: str | None, file: Path
) -> tuple[onnx.ModelProto, dict[str, TensorProto]]:
    """The model with its large tensors outside, and these tensors by file name."""
    outside = onnx.ModelProto()
    _copy_fields(model, outside, but="graph")
    _copy_fields(model.graph, outside.graph, but="initializer")
    parts: dict[str, TensorProto] = {}
    own = data_files(file)
    prefix = "" if suffix is not None else f"{file.stem}_"
    ending = ".external" if suffix is None else suffix
    for tensor in model.graph.initializer:
        size = stored_bytes(tensor)
        if tensor.data_type == TensorProto.STRING or size < SMALLEST_EXTERNAL:
            outside.graph.initializer.append(tensor)
            continue
        stem = prefix + re.sub(r"[^\w.-]", "_", tensor.name)
        name, n = f"{stem}{ending}", 0
        while name in parts or name == file.name or _foreign(file.parent / name, own):
            n += 1
            name = f"{stem}_{n}{ending}"
        parts[name] = tensor
        stub = outside.graph.initializer.add(
            name=tensor.name,
            data_type=tensor.data_type,
            dims=tensor.dims,
            data_location=TensorProto.EXTERNAL,
        )
        length = str(len(_raw_data(tensor)))
        for key, value in (("location", name), ("offset", "0"), ("length", length)):
            stub.external_data.add(key=key, value=value)
    return outside, parts


def data_files(file: Path) -> set[str]:
    """Names of the external data files that the model in a file has; none if it has no model."""
    try:
        model = _stored(file, tensors_stay=True).model
    except Exception:  # no such file, or no model: whatever it is, it has no data files
        return set()
    return {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }


def _foreign(path: Path, own: set[str]) -> bool:
    return path.name not in own and path.exists()


def _copy_fields(source: Any, target: Any, but: str) -> None:
    for field, value in source.ListFields():
        if field.name == but:
            continue
        if isinstance(value, (int, str, bytes)):
            setattr(target, field.name, value)
        else:
            getattr(target, field.name).extend(value)


def _raw_data(tensor: TensorProto) -> bytes:
    tensor = with_data(tensor)
    if not tensor.HasField("raw_data"):
        tensor = numpy_helper.from_array(numpy_helper.to_array(tensor))
    return bytes(tensor.raw_data)
