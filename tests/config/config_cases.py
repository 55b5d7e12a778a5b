"""A small model's layers, made by hand, and ways to get configs from text."""

from __future__ import annotations

import json
from typing import Any

from amct_pytorch.config.calibration_cfg import calibration_config_from_cfg
from amct_pytorch.config.calibration_json import load_calibration_json
from amct_pytorch.config.cfg_file import parse_calibration_cfg, parse_retrain_cfg
from amct_pytorch.config.retrain import retrainable
from amct_pytorch.config.retrain_cfg import retrain_config_from_cfg
from amct_pytorch.config.retrain_json import load_retrain_json
from amct_pytorch.graph.layers import SeenLayer

REUSED = "its weight is used by two calls"


def conv(name: str, reason: str | None = None, cin: int = 8, groups: int = 1) -> SeenLayer:
    return SeenLayer(name, "Conv2d", reason, cin, groups, (8, cin // groups, 3, 3))


def linear(name: str, reason: str | None = None, cin: int = 8) -> SeenLayer:
    return SeenLayer(name, "Linear", reason, cin, 1, (10, cin))


LAYERS = (
    conv("conv1", cin=3),
    conv("layer1.conv"),
    conv("layer1.depthwise", groups=8),
    linear("fc"),
    linear("shared", REUSED),
)
MODULES = ("", "conv1", "bn1", "layer1", *(layer.name for layer in LAYERS[1:]))


def load(tmp_path, document: Any, layers=LAYERS):
    """The config that a JSON file with this document (or text) gives."""
    text = document if isinstance(document, str) else json.dumps(document)
    path = tmp_path / "quant.json"
    path.write_text(text, encoding="utf-8")
    return load_calibration_json(path, layers, MODULES)


def from_cfg(tmp_path, text: str, layers=LAYERS):
    """The config that a .cfg with this text gives."""
    path = tmp_path / "quant.cfg"
    path.write_text(text, encoding="utf-8")
    return calibration_config_from_cfg(parse_calibration_cfg(path), layers, MODULES, str(path))


RETRAIN_LAYERS = retrainable(
    (
        conv("stem", cin=3),
        linear("head"),
        conv("body.conv", cin=32),
        conv("body.depthwise", cin=32, groups=8),
        SeenLayer("pool", "AvgPool2d", None, 0, 1, ()),
        SeenLayer("volume", "Conv3d", None, 8, 1, (8, 8, 3, 3, 3)),
        linear("shared", REUSED),
    )
)
RETRAIN_MODULES = ("", "norm", "body", *(layer.name for layer in RETRAIN_LAYERS))


def load_retrain(tmp_path, document: Any):
    """The retrain config that a JSON file with this document (or text) gives."""
    path = tmp_path / "retrain.json"
    text = document if isinstance(document, str) else json.dumps(document)
    path.write_text(text, encoding="utf-8")
    return load_retrain_json(path, RETRAIN_LAYERS, RETRAIN_MODULES)


def retrain_from_cfg(tmp_path, text: str):
    """The retrain config that a .cfg with this text gives."""
    path = tmp_path / "retrain.cfg"
    path.write_text(text, encoding="utf-8")
    message = parse_retrain_cfg(path)
    return retrain_config_from_cfg(message, RETRAIN_LAYERS, RETRAIN_MODULES, "retrain.cfg")
