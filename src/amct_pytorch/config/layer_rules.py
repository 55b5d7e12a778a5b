"""What the model's layers allow a config to ask of them, and what they get when it does not ask."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from amct_pytorch.config.models import (
    GLOBAL_KEYS,
    ActivationParams,
    AdaParams,
    ArqParams,
    CalibrationConfig,
    IfmrParams,
    LayerConfig,
    WeightParams,
)
from amct_pytorch.errors import did_you_mean
from amct_pytorch.graph.layers import ADA_KINDS, CALIBRATED_KINDS, LAYER_KINDS, SeenLayer

logger = logging.getLogger("amct_pytorch")

# Told once for each thing that a layer cannot have and does not get.
Tell = Callable[[str, str], None]


def default_layer(layer: SeenLayer) -> LayerConfig:
    """The config of a layer for which nothing special was asked."""
    return LayerConfig(
        activation_quant_params=allowed_inputs(layer, IfmrParams(num_bits=8), lambda *_: None),
        weight_quant_params=ArqParams(
            num_bits=8, channel_wise=LAYER_KINDS[layer.kind].channel_wise
        ),
    )


def _may_be_channel_wise(layer: SeenLayer, channel_wise_linear: bool) -> bool:
    return LAYER_KINDS[layer.kind].channel_wise or (channel_wise_linear and layer.kind == "Linear")


def fill_defaults(
    raw: dict[str, Any], layer: SeenLayer, *, channel_wise_linear: bool = False
) -> dict[str, Any]:
    """A layer's entry in a JSON file, with what has no default of its own put in.

    Blocks that are missing get their default, and `channel_wise` and `asymmetric` that of
    the layer's type; what is there stays, right or wrong.
    """
    filled = {
        "activation_quant_params": {"num_bits": 8},
        "weight_quant_params": {"num_bits": 8},
        **raw,
    }
    weights = filled["weight_quant_params"]
    if isinstance(weights, dict):
        default = _may_be_channel_wise(layer, channel_wise_linear)
        filled["weight_quant_params"] = {"channel_wise": default, **weights}
    inputs = filled["activation_quant_params"]
    if isinstance(inputs, dict) and LAYER_KINDS[layer.kind].symmetric_inputs:
        filled["activation_quant_params"] = {"asymmetric": False, **inputs}
    return filled


def allowed_inputs(layer: SeenLayer, inputs: ActivationParams, tell: Tell) -> ActivationParams:
    """`inputs` without what the layer cannot have.

    Args:
        layer: the layer they are for.
        inputs: what was asked for.
        tell: called with key and reason for each thing refused.
    """
    if not LAYER_KINDS[layer.kind].symmetric_inputs:
        return inputs
    if inputs.asymmetric:
        tell("asymmetric", f"{layer.kind} has no zero point for its input")
    return inputs.model_copy(update={"asymmetric": False})


def allowed_weights(
    layer: SeenLayer, weights: WeightParams, tell: Tell, *, channel_wise_linear: bool = False
) -> WeightParams:
    """`weights` without what the layer cannot have.

    Args:
        layer: the layer they are for.
        weights: what was asked for.
        tell: called with key and reason for each thing refused.
        channel_wise_linear: whether Linear layers may have a scale for each output channel.
    """
    kind = LAYER_KINDS[layer.kind]
    if weights.channel_wise and not _may_be_channel_wise(layer, channel_wise_linear):
        has = "no weights"
        if kind.weighted:
            has = "one scale for all its weights, unless linear_channel_wise is true"
        tell("channel_wise", f"{layer.kind} has {has}")
        weights = weights.model_copy(update={"channel_wise": False})
    learned = kind.ada and isinstance(weights, AdaParams)
    if weights.num_bits in (6, 7) and not (kind.low_bit_weights or learned):
        names = [name for name, other in LAYER_KINDS.items() if other.low_bit_weights]
        others = sorted(ADA_KINDS - set(names))
        reason = f"6 and 7 bits are for {', '.join(names)} only"
        if kind.ada:
            reason += f"; with ada_quantize, in the JSON, for {' and '.join(others)} too"
        tell("num_bits", reason)
        weights = weights.model_copy(update={"num_bits": 8})
    if weights.num_bits != 8 and not kind.weighted:
        weights = weights.model_copy(update={"num_bits": 8})
    return weights


def why_not_packed(layer: SeenLayer) -> str | None:
    """Why two 4-bit weights of the layer cannot share a byte; None if they can."""
    if layer.groups > 1:
        return f"it has {layer.groups} groups"
    if layer.in_channels % 2:
        return f"its {layer.in_channels} input channels are an odd number"
    return None


def with_packable_weights(
    config: CalibrationConfig, layers: Sequence[SeenLayer]
) -> tuple[CalibrationConfig, dict[str, str]]:
    """A config with 8 bits for 4 where two weights a byte do not work out; logs that.

    Returns:
        The config, and a sentence for each layer that gets 8 bits.
    """
    configs, notes = dict(config.layers), {}
    for layer in layers:
        asked = configs.get(layer.name)
        if asked is None or not asked.quant_enable or asked.weight_quant_params.num_bits != 4:
            continue
        reason = why_not_packed(layer)
        if reason is not None:
            notes[layer.name] = f"weights get 8 bits, not 4: {reason}"
            logger.warning("%s: %s", layer.name, notes[layer.name])
            weights = asked.weight_quant_params.model_copy(update={"num_bits": 8})
            configs[layer.name] = asked.model_copy(update={"weight_quant_params": weights})
    return config.model_copy(update={"layers": configs}), notes


def configurable(
    layers: Sequence[SeenLayer], keys: Collection[str] = GLOBAL_KEYS
) -> list[SeenLayer]:
    """The layers that a config may hold; each one left out is logged with its reason.

    Args:
        layers: what a look at the model found.
        keys: those that stand beside the layers in the config's file.
    """
    result = []
    for layer in layers:
        reason = layer.reason
        if reason is None and layer.name in keys:
            reason = "its name is a key of the config file; rename the module"
        if reason is None:
            result.append(layer)
        else:
            logger.warning("%s is not quantized: %s", layer.name, reason)
    return result


def unknown_layer(
    name: str,
    layers: Iterable[SeenLayer],
    module_names: Iterable[str] = (),
    kinds: Iterable[str] = CALIBRATED_KINDS,
    done: str = "quantized",
) -> str:
    """The sentence for a name that is none of `layers`, which are of the types `kinds`."""
    known = [layer.name for layer in layers]
    if name in module_names:
        allowed = ", ".join(kinds)
        return f"{name}: the model has it, but it is not of a type that is {done} ({allowed})"
    return f"{name}: the model has no such layer{did_you_mean(name, known)}"


def unknown_modules(names: Iterable[str], module_names: Iterable[str]) -> list[str]:
    """A sentence for each of `names` that is no module of the model."""
    known = set(module_names)
    return [
        f"{name}: the model has no such module{did_you_mean(name, known)}"
        for name in names
        if name not in known
    ]
