"""The user's short config files (.cfg): protobuf text."""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.message import Message

from amct_pytorch.errors import ConfigError
from amct_pytorch.files import PathLike, read_text
from amct_pytorch.proto import (
    AMCTConfig,
    AMCTDistillConfig,
    AMCTQuantCaliConfig,
    AMCTRetrainConfig,
    AutoChannelPruneConfig,
)
from amct_pytorch.proto.text import parse_text

AnyMessage = TypeVar("AnyMessage", bound=Message)


def parse_calibration_cfg(path: PathLike) -> AMCTConfig:
    """Read a calibration .cfg (message AMCTConfig); see `_parse`."""
    return _parse(path, AMCTConfig())


def parse_kv_cache_cfg(path: PathLike) -> AMCTQuantCaliConfig:
    """Read a KV-cache calibration .cfg (message AMCTQuantCaliConfig); see `_parse`."""
    return _parse(path, AMCTQuantCaliConfig())


def parse_retrain_cfg(path: PathLike, parameter: str = "config_defination") -> AMCTRetrainConfig:
    """Read a .cfg of training, sparsity or both (message AMCTRetrainConfig); see `_parse`."""
    return _parse(path, AMCTRetrainConfig(), parameter)


def parse_distill_cfg(path: PathLike) -> AMCTDistillConfig:
    """Read a distillation .cfg (message AMCTDistillConfig); see `_parse`."""
    return _parse(path, AMCTDistillConfig())


def parse_prune_search_cfg(path: PathLike) -> AutoChannelPruneConfig:
    """Read a .cfg of the channel-prune search (AutoChannelPruneConfig); see `_parse`."""
    return _parse(path, AutoChannelPruneConfig(), "config")


def _parse(path: PathLike, message: AnyMessage, parameter: str = "config_defination") -> AnyMessage:
    """Read a .cfg into `message`; what it says is not yet held against a model.

    Args:
        path: the text file.
        parameter: name of the argument that the path came in.
        message: an empty message of the file's type (see the .proto files).

    Raises:
        FileMissingError, FileAccessError: the file cannot be read.
        ConfigError: it is not UTF-8, does not parse (with line and column, and the nearest
            field name where one is unknown), or lacks a required field.
    """
    text = read_text(path, parameter)
    parse_text(text, message, str(path), ConfigError, last_wins=False)
    return message
