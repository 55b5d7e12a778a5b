"""Protobuf text format, with errors that say where and what was meant."""

from __future__ import annotations

import io
import re
from collections.abc import MutableSequence
from typing import Any

import numpy as np
from google.protobuf import text_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from amct_pytorch.errors import AmctError, did_you_mean

_INTEGERS = (
    FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_UINT32,
    FieldDescriptor.CPPTYPE_UINT64,
)
_UNKNOWN_FIELD = re.compile(r'Message type "([\w.]+)" has no field named "(.*)"\.')
_UNKNOWN_VALUE = re.compile(r'Enum type "([\w.]+)" has no value named (.*)\.')


def parse_text(
    text: str, message: Any, source: str, error: type[AmctError], *, last_wins: bool
) -> None:
    """Parse protobuf text into `message`.

    Args:
        text: the whole file.
        message: an empty message of the type expected; filled in place.
        source: the file's name for error messages.
        error: class of the error to raise.
        last_wins: whether of an optional field given twice the later value counts; if not,
            that is an error.

    Raises:
        AmctError: of class `error`; with line and column where the text does not parse, or
            naming the required fields that are missing.
    """
    parse = text_format.Merge if last_wins else text_format.Parse
    try:
        parse(text, message)
    except text_format.ParseError as caught:
        where = f"line {caught.GetLine()}, column {caught.GetColumn()}"
        raise error(f"{source}: {where}: {_explain(str(caught), message)}") from None
    missing = message.FindInitializationErrors()
    if missing:
        raise error(f"{source}: required, but missing: {', '.join(missing[:10])}")


def print_text(message: Message) -> str:
    """`message` as protobuf text; floats in the shortest form that reads back the same."""
    lines: list[str] = []
    _print_fields(message, "", lines)
    return "".join(lines)


def _print_fields(message: Message, indent: str, lines: list[str]) -> None:
    """Appends the lines of a message's fields.

    Numbers are printed here: protobuf's printer takes six times as long for a list of them, and
    a record has two for each channel of the network.
    """
    for field, value in message.ListFields():
        start = f"{indent}{field.name}"
        values = value if isinstance(value, MutableSequence) else (value,)
        if field.cpp_type == field.CPPTYPE_MESSAGE:
            for inner in values:
                lines.append(f"{start} {{\n")
                _print_fields(inner, f"{indent}  ", lines)
                lines.append(f"{indent}}}\n")
        elif field.cpp_type == field.CPPTYPE_FLOAT:
            # numpy writes a float32 with no more digits than tell it from its neighbours.
            lines += [f"{start}: {number!s}\n" for number in np.asarray(values, np.float32)]
        elif field.cpp_type in _INTEGERS:
            lines += [f"{start}: {number}\n" for number in values]
        else:
            out = io.StringIO()
            for one in values:
                text_format.PrintField(field, one, out, indent=len(indent), as_utf8=True)
            lines.append(out.getvalue())


def _explain(complaint: str, message: Any) -> str:
    """Protobuf's complaint without its position, with the nearest name where one is wrong."""
    complaint = re.sub(r"^\d+:\d+ : ", "", complaint)
    unknown = _UNKNOWN_FIELD.search(complaint)
    if unknown:
        descriptor = _nested_types(message.DESCRIPTOR).get(unknown[1])
        fields = [field.name for field in descriptor.fields] if descriptor else []
        hint = did_you_mean(unknown[2], fields) or f"; allowed are {', '.join(fields)}"
        return f"unknown field {_short(unknown[2])!r}{hint}"
    unknown = _UNKNOWN_VALUE.search(complaint)
    if unknown:
        values = _enum_values(message.DESCRIPTOR, unknown[1])
        return f"unknown value {_short(unknown[2])}; allowed are {', '.join(values)}"
    return _short(complaint)


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:197]}..."


def _nested_types(root: Descriptor) -> dict[str, Descriptor]:
    """All message types that can occur inside `root`, itself included, by full name."""
    found: dict[str, Descriptor] = {}
    queue = [root]
    while queue:
        descriptor = queue.pop()
        if descriptor.full_name not in found:
            found[descriptor.full_name] = descriptor
            queue += [field.message_type for field in descriptor.fields if field.message_type]
    return found


def _enum_values(root: Descriptor, enum_name: str) -> list[str]:
    for descriptor in _nested_types(root).values():
        field: Any
        for field in descriptor.fields:
            if field.enum_type is not None and field.enum_type.full_name == enum_name:
                return [value.name for value in field.enum_type.values]
    return []
