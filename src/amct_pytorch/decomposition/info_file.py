"""The decomposition info file: which layers were split, into what shapes.

A JSON list with one object a layer. `mode` says which half of the channel pair and of the kernel
pair the first convolution has (F: the first half, S: the second); what is built follows the
shapes. Ours beside the documented ones: mode ``TUCKER2``, with a node ``core`` between ``first``
and ``last``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from amct_pytorch.config.explain import explain
from amct_pytorch.decomposition.eligibility import not_replaceable
from amct_pytorch.decomposition.geometry import Split, axis_owners
from amct_pytorch.errors import ConfigError, ProblemList, did_you_mean, shown
from amct_pytorch.files import PathLike, read_text

_POSITIVE = "an integer >= 1"
_PAIR = "two integers >= 1"
_SHAPE = "four integers >= 1: out channels, in channels, kernel height, kernel width"
Positive = Annotated[int, Field(ge=1, description=_POSITIVE)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class OriginalLayer(_Strict):
    """The layer that was split."""

    name: str = Field(description="the layer's dotted module path")
    in_channels: int = Field(ge=1, description=_POSITIVE)
    out_channels: int = Field(ge=1, description=_POSITIVE)
    kernel_size: list[Positive] = Field(min_length=2, max_length=2, description=_PAIR)
    stride: list[Positive] = Field(min_length=2, max_length=2, description=_PAIR)
    dilation: list[Positive] = Field(min_length=2, max_length=2, description=_PAIR)
    groups: int = Field(ge=1, description=_POSITIVE)


class Node(_Strict):
    """One of the convolutions it became."""

    weight_shape: list[Positive] = Field(min_length=4, max_length=4, description=_SHAPE)


class Nodes(_Strict):
    """The convolutions, in the order they run."""

    first: Node = Field(description='{"weight_shape": [...]}')
    core: Node | None = Field(default=None, description='{"weight_shape": [...]}')
    last: Node = Field(description='{"weight_shape": [...]}')


class DecomposedLayer(_Strict):
    """One object of the file."""

    ori_layer_info: OriginalLayer = Field(description="an object that describes the layer")
    mode: Literal["FCFK", "FCSK", "SCFK", "SCSK", "TUCKER2"] = Field(
        description='"FCFK", "FCSK", "SCFK", "SCSK", "TUCKER2"'
    )
    decom_nodes: Nodes = Field(description="an object with first and last")

    @property
    def split(self) -> Split:
        """The shapes as a split."""
        nodes = (self.decom_nodes.first, self.decom_nodes.core, self.decom_nodes.last)
        shapes = [node.weight_shape for node in nodes if node is not None]
        return tuple((a, b, c, d) for a, b, c, d in shapes)


def describe(name: str, conv: nn.Conv2d, mode: str, split: Split) -> DecomposedLayer:
    """The file's object for one layer."""
    nodes = [Node(weight_shape=list(shape)) for shape in split]
    return DecomposedLayer(
        ori_layer_info=OriginalLayer(
            name=name,
            in_channels=conv.in_channels,
            out_channels=conv.out_channels,
            kernel_size=list(conv.kernel_size),
            stride=list(conv.stride),
            dilation=list(conv.dilation),
            groups=conv.groups,
        ),
        mode=mode,  # type: ignore[arg-type]
        decom_nodes=Nodes(
            first=nodes[0], core=nodes[1] if len(nodes) == 3 else None, last=nodes[-1]
        ),
    )


def dump_info(layers: list[DecomposedLayer]) -> str:
    """The file's text."""
    document = [layer.model_dump(mode="json", exclude_none=True) for layer in layers]
    return json.dumps(document, indent=4, ensure_ascii=False) + "\n"


def load_info(path: PathLike, convs: Mapping[str, nn.Conv2d]) -> dict[str, Split]:
    """Read an info file and hold it against the model.

    Args:
        path: the JSON file.
        convs: every Conv2d of the model by name.

    Returns:
        The split of each layer in the file, in its order.

    Raises:
        FileMissingError, FileAccessError: the file cannot be read.
        ConfigError: it is not JSON, or, all in one error (up to ten): wrong keys or values,
            layers that the model does not have or that are not those of the file, shapes that
            do not fit together.
    """
    source = str(path)
    text = read_text(path, "decompose_info_path")
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(f"{source}: {where}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not an info file: {error}") from None
    if not isinstance(document, list):
        raise ConfigError(
            f"{source}: holds {shown(document)}; allowed: a list with one object a layer"
        )
    problems = ProblemList(source, ConfigError)
    splits: dict[str, Split] = {}
    for number, raw in enumerate(document):
        layer = _parsed(raw, number, problems)
        if layer is None:
            continue
        name = layer.ori_layer_info.name
        if name in splits:
            problems.add(f"[{number}].ori_layer_info.name: {name!r} is there more than once")
        before = len(problems)
        _hold_against(layer, number, convs, problems)
        if len(problems) == before:
            splits[name] = layer.split
    problems.raise_if_any()
    return splits


def _parsed(raw: Any, number: int, problems: ProblemList) -> DecomposedLayer | None:
    if not isinstance(raw, dict):
        problems.add(f"[{number}]: {shown(raw)}; allowed: an object")
        return None
    try:
        return DecomposedLayer.model_validate(raw)
    except ValidationError as error:
        place = f"[{number}]"
        explain(error, DecomposedLayer, problems, lambda parts: ".".join([place, *parts]))
        return None


def _hold_against(
    layer: DecomposedLayer, number: int, convs: Mapping[str, nn.Conv2d], problems: ProblemList
) -> None:
    """Notes what keeps a layer of the file from being built in the model."""
    info, split = layer.ori_layer_info, layer.split
    place = f"[{number}].ori_layer_info"
    conv = convs.get(info.name)
    if conv is None:
        problems.add(
            f"{place}.name: the model has no Conv2d {info.name!r}{did_you_mean(info.name, convs)}"
        )
        return
    reason = not_replaceable(conv)
    if reason:
        problems.add(f"{place}.name: {info.name!r} cannot be split: {reason}")
    for key in ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups"):
        found, wanted = getattr(conv, key), getattr(info, key)
        found = list(found) if isinstance(found, tuple) else found
        if found != wanted:
            problems.add(f"{place}.{key}: {wanted}, while layer {info.name!r} has {found}")
    if info.groups != 1 or info.dilation != [1, 1]:
        problems.add(f"{place}: only groups 1 and dilation 1 can be split")
    widths = [split[0][1], *(shape[0] for shape in split)]
    inner = [shape[1] for shape in split[1:]]
    if widths[0] != info.in_channels or widths[-1] != info.out_channels or widths[1:-1] != inner:
        problems.add(
            f"[{number}].decom_nodes: weight shapes {shown([list(s) for s in split])} do not lead "
            f"from {info.in_channels} to {info.out_channels} channels"
        )
    try:
        axis_owners((info.kernel_size[0], info.kernel_size[1]), split)
    except ValueError as error:
        problems.add(f"[{number}].decom_nodes: {error}")
