"""Blocks of a .cfg that say how a layer's quantization is trained, in every flow that trains it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from amct_pytorch.config.cfg_block import shortest
from amct_pytorch.config.explain import explain
from amct_pytorch.config.overrides import Overrides
from amct_pytorch.config.retrain import DataParams, weights_default, why_not_channel_wise
from amct_pytorch.errors import ProblemList
from amct_pytorch.graph.layers import SeenLayer


@dataclass(frozen=True)
class Wording:
    """What the parts of an entry are called in one schema.

    Attributes:
        data: field of the part for inputs.
        weights: field of the part for weights.
        weights_oneof: the choice of algorithm in it.
        default_algo: the algorithm where none is chosen.
    """

    data: str
    weights: str
    weights_oneof: str
    default_algo: str


@dataclass(frozen=True)
class TrainedWeights:
    """What a block asks of the weights of every layer it applies to.

    Attributes:
        place: where it stands in the file, for messages.
        keys: as in the JSON; `channel_wise` only where the file has it.
    """

    place: str
    keys: dict[str, Any]


@dataclass(frozen=True)
class TrainedBlock:
    """The two parts of an entry; None where the file has no such part."""

    data: DataParams | None = None
    weights: TrainedWeights | None = None


def read_trained_block(
    entry: Any, where: str, wording: Wording, problems: ProblemList
) -> TrainedBlock:
    """The parts of an entry.

    Those with problems count as left out, so that the search for more can go on.

    Args:
        entry: the message that holds them.
        where: what stands before their names in messages.
        wording: their names.
        problems: gets what is out of range.
    """
    data = weights = None
    if entry.HasField(wording.data):
        place = f"{where}{wording.data}.ulq_quantize"
        data = _data(getattr(entry, wording.data).ulq_quantize, place, problems)
    if entry.HasField(wording.weights):
        block = getattr(entry, wording.weights)
        algo = block.WhichOneof(wording.weights_oneof) or wording.default_algo
        place = f"{where}{wording.weights}.{algo}"
        weights = _weights(getattr(block, algo), algo, place, problems)
    return TrainedBlock(data, weights)


def enum_name(message: Any, field: str) -> str:
    """Name of the value that an enum field has."""
    descriptor = message.DESCRIPTOR.fields_by_name[field]
    name: str = descriptor.enum_type.values_by_number[getattr(message, field)].name
    return name


def _data(message: Any, place: str, problems: ProblemList) -> DataParams | None:
    raw: dict[str, Any] = {"dst_type": enum_name(message, "dst_type")}
    if message.HasField("clip_max_min"):
        raw["clip_max"] = shortest(message.clip_max_min.clip_max)
        raw["clip_min"] = shortest(message.clip_max_min.clip_min)
    if message.HasField("fixed_min"):
        raw["fixed_min"] = message.fixed_min

    def in_cfg(parts: list[str]) -> str:
        inside = "clip_max_min." if parts[0].startswith("clip") else ""
        return ".".join([place, inside + parts[0], *parts[1:]])

    try:
        return DataParams.model_validate(raw)
    except ValidationError as error:
        explain(error, DataParams, problems, in_cfg)
        return None


def _weights(message: Any, algo: str, place: str, problems: ProblemList) -> TrainedWeights:
    keys: dict[str, Any] = {"algo": algo, "dst_type": enum_name(message, "dst_type")}
    if keys["dst_type"] == "INT16":
        problems.add(
            f'{place}.dst_type is INT16; allowed: "INT8" or "INT4" '
            "(INT16 is reserved for a later version)"
        )
        keys["dst_type"] = "INT8"
    if message.HasField("channel_wise"):
        keys["channel_wise"] = message.channel_wise
    return TrainedWeights(place, keys)


def layer_keys(
    layer: SeenLayer,
    asked: Overrides[TrainedBlock],
    wording: Wording,
    problems: ProblemList,
    refused: dict[str, list[str]],
) -> tuple[DataParams, dict[str, Any]]:
    """What applies to the input and to the weights of a layer, each from the nearest block.

    Args:
        layer: the layer.
        asked: the blocks of the file.
        wording: names of their parts.
        problems: gets what was asked of it by name and that it cannot have.
        refused: gets, by reason, the layer that a block for many asks `channel_wise` of in vain.
    """
    blocks = (asked.by_name.get(layer.name), asked.by_type.get(layer.kind), asked.common)
    given = [block for block in blocks if block is not None]
    data = next((block.data for block in given if block.data is not None), DataParams())
    nothing = TrainedWeights(wording.weights, {})
    weights = next((block.weights for block in given if block.weights is not None), nothing)
    keys = {**weights_default(layer), **weights.keys}
    reason = why_not_channel_wise(layer)
    if keys["channel_wise"] and reason is not None:
        named = asked.by_name.get(layer.name)
        if named is not None and named.weights is weights:
            problems.add(f"{weights.place}: channel_wise is not allowed for {layer.name}: {reason}")
        elif not asked.skipped(layer):
            refused.setdefault(reason, []).append(layer.name)
        keys["channel_wise"] = False
    return data, keys
