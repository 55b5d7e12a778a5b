"""One CalibrationConfig block of a .cfg as the params of a layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from google.protobuf.message import Message
from pydantic import ValidationError

from amct_pytorch.config.explain import explain
from amct_pytorch.config.models import (
    ActivationParams,
    ArqParams,
    IfmrParams,
    LayerConfig,
    WeightParams,
)
from amct_pytorch.errors import ProblemList

# Names of JSON keys that the .cfg calls otherwise.
_CFG_NAMES = {
    "search_range": "search_range_start/end",
    "search_range[0]": "search_range_start",
    "search_range[1]": "search_range_end",
    "beta_range": "beta_range_start/end",
    "beta_range[0]": "beta_range_start",
    "beta_range[1]": "beta_range_end",
    "num_bits": "quant_bits",
    "dmq_balancer_param": "dmq_balancer.migration_strength",
}


@dataclass(frozen=True)
class Block:
    """What a block asks of every layer it applies to.

    Attributes:
        place: where it stands in the file, for messages.
        activation: params of the layer's input.
        weights: params of its weights, but for `channel_wise`.
        channel_wise: None where the layer's type decides.
        balancer: migration strength; None: no balancing.
    """

    place: str = "common_config"
    activation: ActivationParams = field(default_factory=lambda: IfmrParams(num_bits=8))
    weights: WeightParams = field(default_factory=lambda: ArqParams(num_bits=8, channel_wise=False))
    channel_wise: bool | None = None
    balancer: float | None = None


def shortest(value: float) -> float:
    """The shortest decimal that a float32 stands for: 0.7, not 0.699999988079071."""
    return float(str(np.float32(value)))


def read_block(message: Any, place: str, problems: ProblemList) -> Block | None:
    """The block in `message`, a CalibrationConfig.

    Fields that are not set have the schema's defaults, whatever other blocks say.

    Args:
        message: the parsed block.
        place: where it stands in the file, for messages.
        problems: gets what is out of range.

    Returns:
        The block, or None where problems were added.
    """
    activation = message.WhichOneof("acts_quant_algo") or "ifmr_quantize"
    weights = message.WhichOneof("wts_quant_algo") or "arq_quantize"
    raw: dict[str, Any] = {
        "activation_quant_params": activation_of(getattr(message, activation), activation),
        "weight_quant_params": _weights(getattr(message, weights), weights),
    }
    if message.HasField("dmq_balancer"):
        raw["dmq_balancer_param"] = shortest(message.dmq_balancer.migration_strength)

    def in_cfg(parts: list[str]) -> str:
        algorithm = {"activation_quant_params": activation, "weight_quant_params": weights}
        names = [algorithm.get(part) or _CFG_NAMES.get(part, part) for part in parts]
        return ".".join([place, *names])

    sound = True
    if raw["activation_quant_params"].pop("dst_type", "INT8") != "INT8":
        problems.add(
            f"{place}.{activation}.dst_type is INT16; allowed: INT8 "
            "(INT16 activations are not supported in this version)"
        )
        sound = False
    try:
        params = LayerConfig.model_validate(raw)
    except ValidationError as error:
        explain(error, LayerConfig, problems, in_cfg)
        return None
    if not sound:
        return None
    algorithm = getattr(message, weights)
    return Block(
        place=place,
        activation=params.activation_quant_params,
        weights=params.weight_quant_params,
        channel_wise=algorithm.channel_wise if algorithm.HasField("channel_wise") else None,
        balancer=params.dmq_balancer_param,
    )


def activation_of(message: Message, name: str) -> dict[str, Any]:
    """The JSON keys that an `acts_quant_algo` block stands for.

    Args:
        message: the block.
        name: of its field.
    """
    raw = _set_fields(message)
    raw["act_algo"] = {"ifmr_quantize": "ifmr", "hfmg_quantize": "hfmg"}[name]
    raw["num_bits"] = 8
    _join(raw, message, "search_range")
    return raw


def _weights(message: Message, name: str) -> dict[str, Any]:
    raw = _set_fields(message)
    raw["wts_algo"] = name
    raw["num_bits"] = raw.pop("quant_bits", 8)
    raw["channel_wise"] = raw.get("channel_wise", False)
    _join(raw, message, "beta_range")
    return raw


def _set_fields(message: Message) -> dict[str, Any]:
    """The fields that the file sets, floats as they were written, enum values by name."""
    raw: dict[str, Any] = {}
    for descriptor, value in message.ListFields():
        if descriptor.enum_type is not None:
            raw[descriptor.name] = descriptor.enum_type.values_by_number[value].name
        elif isinstance(value, float):
            raw[descriptor.name] = shortest(value)
        else:
            raw[descriptor.name] = value
    return raw


def _join(raw: dict[str, Any], message: Message, key: str) -> None:
    """Make one [start, end] of the two fields, if either of them is set."""
    ends = (f"{key}_start", f"{key}_end")
    if any(end in raw for end in ends):
        raw[key] = [shortest(getattr(message, end)) for end in ends]
        for end in ends:
            raw.pop(end, None)
