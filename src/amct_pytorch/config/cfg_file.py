"""The user's short config files (.cfg): protobuf text."""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.message import Message

from amct_pytorch.errors import ConfigError
from amct_pytorch.files import PathLike, read_text
from amct_pytorch.proto import AMCTConfig, AMCTQuantCaliConfig
from amct_pytorch.proto.text import parse_text

AnyMessage = TypeVar("AnyMessage", bound=Message)


def parse_calibration_cfg(path: PathLike) -> AMCTConfig:
    """Read a calibration .cfg (message AMCTConfig); see `_parse`."""
    return _parse(path, AMCTConfig())


def parse_kv_cache_cfg(path: PathLike) -> AMCTQuantCaliConfig:
    """Read a KV-cache calibration .cfg (message AMCTQuantCaliConfig); see `_parse`."""
    return _parse(path, AMCTQuantCaliConfig())


def _parse(path: PathLike, message: AnyMessage) -> AnyMessage:
    """Read a .cfg into `message`; what it says is not yet held against a model.

    Args:
        path: the text file.
        message: an empty message of the file's type (see the .proto files).

    Raises:
        FileMissingError, FileAccessError: the file cannot be read.
        ConfigError: it is not UTF-8, does not parse (with line and column, and the nearest
            field name where one is unknown), or lacks a required field.
    """
    text = read_text(path, "config_defination")
    parse_text(text, message, str(path), ConfigError, last_wins=False)
    return message
