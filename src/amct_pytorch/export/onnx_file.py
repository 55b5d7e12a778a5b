"""ONNX files: read with clear errors, written whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, checker, external_data_helper

from amct_pytorch.errors import ExportError, FileAccessError, FileMissingError

# Protobuf cannot hold 2 GiB in one message. This counts tensors; names and nodes come on top.
LARGEST_FILE = (1 << 31) - (1 << 24)
# Smaller tensors stay in the model file: runtimes read shapes and scalars from there.
SMALLEST_EXTERNAL = 1024
log = logging.getLogger("amct_pytorch")


def load_onnx(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """The model in a file, its external data included.

    Args:
        path: an ONNX file.

    Raises:
        FileMissingError: there is no such file, or not its external data.
        FileAccessError: it cannot be read.
        ExportError: it is no ONNX model, or a damaged one.
    """
    file = Path(path)
    if not file.exists():
        raise FileMissingError(f"ONNX file {str(file)!r} does not exist")
    if not file.is_file():
        raise FileAccessError(f"{str(file)!r} is a folder; an ONNX file is needed")
    try:
        model = onnx.load(str(file), load_external_data=False)
    except OSError as error:
        raise FileAccessError(f"ONNX file {str(file)!r} cannot be read: {error}") from error
    except Exception as error:
        raise ExportError(f"{str(file)!r} is not a readable ONNX model: {error}") from error
    if not model.HasField("graph") or not model.opset_import:
        raise ExportError(f"{str(file)!r} is not an ONNX model: it has no graph or no opset")
    try:
        external_data_helper.load_external_data_for_model(model, str(file.parent))
    except (OSError, ValueError, checker.ValidationError) as error:
        raise FileMissingError(
            f"ONNX file {str(file)!r}: its external data cannot be read: {error}"
        ) from error
    return model


def save_onnx(
    model: onnx.ModelProto,
    path: str | os.PathLike[str],
    *,
    external_suffix: str = ".external",
    largest_file: int = LARGEST_FILE,
) -> None:
    """Write a model whole or not at all; parent folders are made, an old file is replaced.

    A model whose tensors have `largest_file` bytes or more goes with one external data file per
    tensor beside it, named after the tensor with `external_suffix`. A replaced model file
    is named in the log.

    Args:
        model: the model; not changed.
        path: where to.
        external_suffix: ``_deploy.external``, ``_fakequant.external``, or empty.
        largest_file: bytes from which on the model is split; below 2 GiB for tests.

    Raises:
        FileAccessError: a folder cannot be made or a file cannot be written; nothing of the
            model is left then.
    """
    file = Path(path)
    size = sum(_stored_bytes(tensor) for tensor in model.graph.initializer)
    parts: dict[str, bytes] = {}
    if size >= largest_file:
        model, parts = _split(model, external_suffix, file)
    replaced = file.exists()
    parts[file.name] = model.SerializeToString()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _write_all(file.parent, parts)
    except OSError as error:
        raise FileAccessError(f"{str(file)!r} cannot be written: {error}") from error
    if replaced:
        log.warning("file %s was there and is overwritten", file)


def _split(
    model: onnx.ModelProto, suffix: str, file: Path
) -> tuple[onnx.ModelProto, dict[str, bytes]]:
    """The model with its large tensors outside, and the bytes of each by file name."""
    outside = onnx.ModelProto()
    _copy_fields(model, outside, but="graph")
    _copy_fields(model.graph, outside.graph, but="initializer")
    parts: dict[str, bytes] = {}
    for tensor in model.graph.initializer:
        data = _raw_data(tensor)
        if data is None or len(data) < SMALLEST_EXTERNAL:
            outside.graph.initializer.append(tensor)
            continue
        stem = re.sub(r"[^\w.-]", "_", tensor.name)
        name, n = f"{stem}{suffix}", 0
        while name in parts or name == file.name:
            n += 1
            name = f"{stem}_{n}{suffix}"
        parts[name] = data
        stub = outside.graph.initializer.add(
            name=tensor.name,
            data_type=tensor.data_type,
            dims=tensor.dims,
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (("location", name), ("offset", "0"), ("length", str(len(data)))):
            stub.external_data.add(key=key, value=value)
    return outside, parts


def _copy_fields(source: Any, target: Any, but: str) -> None:
    for field, value in source.ListFields():
        if field.name == but:
            continue
        if isinstance(value, (int, str, bytes)):
            setattr(target, field.name, value)
        else:
            getattr(target, field.name).extend(value)


def _stored_bytes(tensor: TensorProto) -> int:
    return len(tensor.raw_data) if tensor.HasField("raw_data") else tensor.ByteSize()


def _raw_data(tensor: TensorProto) -> bytes | None:
    if tensor.HasField("raw_data"):
        return bytes(tensor.raw_data)
    if tensor.data_type == TensorProto.STRING:
        return None
    array = onnx.numpy_helper.to_array(tensor)
    return bytes(onnx.numpy_helper.from_array(array).raw_data)


def _write_all(folder: Path, parts: dict[str, bytes]) -> None:
    """Write files under temporary names, then rename them all, the last one last."""
    temporary: dict[str, Path] = {}
    try:
        for name, data in parts.items():
            temporary[name] = folder / f".{name}.{os.getpid()}.tmp"
            with temporary[name].open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        for name, path in temporary.items():
            path.replace(folder / name)
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                path.unlink()
