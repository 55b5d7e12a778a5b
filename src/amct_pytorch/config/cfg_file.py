"""The user's short config files (.cfg): protobuf text."""

from __future__ import annotations

from amct_pytorch.errors import ConfigError
from amct_pytorch.files import PathLike, read_text
from amct_pytorch.proto import AMCTConfig
from amct_pytorch.proto.text import parse_text


def parse_calibration_cfg(path: PathLike) -> AMCTConfig:
    """Read a calibration .cfg; what it says is not yet held against a model.

    Args:
        path: a text file of message AMCTConfig (see the .proto file).

    Raises:
        FileMissingError, FileAccessError: the file cannot be read.
        ConfigError: it is not UTF-8, does not parse (with line and column, and the nearest
            field name where one is unknown), or lacks a required field.
    """
    message = AMCTConfig()
    text = read_text(path, "config_defination")
    parse_text(text, message, str(path), ConfigError, last_wins=False)
    return message
