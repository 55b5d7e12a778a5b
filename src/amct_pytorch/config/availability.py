"""What a config may ask for that this version cannot do yet.

Files are checked in full whether a feature is there or not; a feature that arrives loses its
entry in the table below and nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from amct_pytorch.config.models import AdaParams, CalibrationConfig, LayerConfig
from amct_pytorch.errors import ConfigError, ProblemList


@dataclass(frozen=True)
class Unavailable:
    """One feature to come.

    Attributes:
        feature: its name in the words of the files, JSON and .cfg.
        asked_by: whether a layer's config asks for it.
    """

    feature: str
    asked_by: Callable[[LayerConfig], bool]


UNAVAILABLE = (
    Unavailable(
        'wts_algo "ada_quantize"',
        lambda layer: isinstance(layer.weight_quant_params, AdaParams),
    ),
    Unavailable(
        "dmq_balancer_param (dmq_balancer)",
        lambda layer: layer.dmq_balancer_param is not None,
    ),
)


def unavailable_features(config: CalibrationConfig) -> list[str]:
    """A sentence for each feature that enabled layers ask for and this version lacks."""
    sentences = []
    for entry in UNAVAILABLE:
        names = [name for name, layer in config.enabled_layers().items() if entry.asked_by(layer)]
        if names:
            more = f" and {len(names) - 3} more layers" if len(names) > 3 else ""
            layers = ", ".join(names[:3]) + more
            sentences.append(f"{entry.feature} is not available in this version (asked: {layers})")
    return sentences


def check_available(config: CalibrationConfig, source: str) -> None:
    """Raise where a config asks for what this version cannot do.

    Args:
        config: a checked config.
        source: the file's name for the message.

    Raises:
        ConfigError: naming the features and the layers.
    """
    problems = ProblemList(source, ConfigError)
    for sentence in unavailable_features(config):
        problems.add(sentence)
    problems.raise_if_any()
