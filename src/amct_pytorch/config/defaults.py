"""The calibration config that is written when nobody asks for anything special."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from amct_pytorch.config.layer_rules import configurable, default_layer, unknown_layer
from amct_pytorch.config.models import CalibrationConfig
from amct_pytorch.errors import ArgumentTypeError, ArgumentValueError, ProblemList, shown
from amct_pytorch.graph.layers import SeenLayer


def default_calibration_config(
    layers: Sequence[SeenLayer],
    *,
    batch_num: int = 1,
    activation_offset: bool = True,
    skip_layers: Iterable[str] | None = None,
) -> CalibrationConfig:
    """IFMR and ARQ with 8 bits for every layer that can be quantized.

    Layers that cannot be quantized are left out of the config, each with a line in the log
    that says why. Layers in `skip_layers` stay in it with `quant_enable` false, so that a
    user can switch them on in the file.

    Args:
        layers: what a look at the model found.
        batch_num: forward passes that calibration observes, >= 1.
        activation_offset: whether activations get a zero point. It decides for all layers:
            none of them carries an `asymmetric` of its own.
        skip_layers: names of layers to leave in float; None: none.

    Raises:
        ArgumentTypeError: an argument has the wrong type.
        ArgumentValueError: `batch_num` is below 1, or a name is no layer of the model.
    """
    if isinstance(batch_num, bool) or not isinstance(batch_num, int):
        raise ArgumentTypeError(f"batch_num is {shown(batch_num)}; allowed: an integer >= 1")
    if batch_num < 1:
        raise ArgumentValueError(f"batch_num is {batch_num}; allowed: an integer >= 1")
    if not isinstance(activation_offset, bool):
        raise ArgumentTypeError(
            f"activation_offset is {shown(activation_offset)}; allowed: True or False"
        )
    skipped = _names(skip_layers)
    problems = ProblemList("skip_layers", ArgumentValueError)
    for name in sorted(skipped - {layer.name for layer in layers}):
        problems.add(unknown_layer(name, layers))
    problems.raise_if_any()
    return CalibrationConfig(
        batch_num=batch_num,
        activation_offset=activation_offset,
        layers={
            layer.name: default_layer(layer).model_copy(
                update={"quant_enable": layer.name not in skipped}
            )
            for layer in configurable(layers)
        },
    )


def _names(skip_layers: Iterable[str] | None) -> set[str]:
    if skip_layers is None:
        return set()
    if not isinstance(skip_layers, (list, tuple, set, frozenset)) or not all(
        isinstance(name, str) for name in skip_layers
    ):
        raise ArgumentTypeError(f"skip_layers is {shown(skip_layers)}; allowed: a list of str")
    return set(skip_layers)
