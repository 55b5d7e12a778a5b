"""The config of `quantize`: every key with its type, its range and its default."""

from __future__ import annotations

import fnmatch
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from amct_pytorch.config.explain import dotted, explain
from amct_pytorch.config.low_bit_table import Combination
from amct_pytorch.config.models import Strict, YesNo
from amct_pytorch.errors import (
    ArgumentTypeError,
    ConfigError,
    ProblemList,
    did_you_mean,
    shown,
)
from amct_pytorch.formats import BLOCK_SIZE, FORMATS, Granularity, NumberFormat

KEYS = ("batch_num", "quant_cfg", "algorithm", "skip_layers")
BLOCKS = ("weights", "inputs")
LARGEST_BATCH_NUM = 2**32 - 1
GROUP_STEP = 32

Block = TypeVar("Block", bound=BaseModel)

_GroupSize = Annotated[
    int | None,
    Field(
        default=None,
        description="with strategy 'group' a multiple of 32 in [32, K - 1]; absent otherwise",
    ),
]


def _words(*names: str) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _check_group_size(strategy: str, group_size: int | None, of_mx: bool) -> None:
    """Raises ValueError, with what is allowed, for a size that does not go with the strategy."""
    if strategy != "group":
        if group_size is not None:
            raise ValueError(f'no group_size with strategy "{strategy}"')
    elif of_mx and group_size != BLOCK_SIZE:
        raise ValueError(f"group_size {BLOCK_SIZE}, the block of mx formats")
    elif group_size is None or group_size < GROUP_STEP or group_size % GROUP_STEP:
        raise ValueError(
            'with strategy "group", a group_size that is a multiple of 32, at least 32'
        )


class _TensorConfig(Strict):
    """What weights and inputs have in common."""

    type: str
    symmetric: YesNo = True
    strategy: str
    group_size: _GroupSize = None

    @model_validator(mode="after")
    def _fits(self) -> _TensorConfig:
        _check_group_size(self.strategy, self.group_size, self.type.startswith("mx"))
        return self

    @property
    def format(self) -> NumberFormat:
        """The number format."""
        return FORMATS[self.type]

    @property
    def granularity(self) -> Granularity:
        """Which elements share a scale."""
        return Granularity(self.strategy, self.group_size)  # type: ignore[arg-type]


def _defaults(raw: Any, otherwise: str) -> Any:
    """Adds the strategy that goes with the type, and the block size of mx formats."""
    if not isinstance(raw, dict):
        return raw
    of_mx = str(raw.get("type", "")).startswith("mx")
    filled = {"strategy": "group" if of_mx else otherwise, **raw}
    if of_mx and filled["strategy"] == "group":
        filled.setdefault("group_size", BLOCK_SIZE)
    return filled


class WeightsConfig(_TensorConfig):
    """``quant_cfg.weights``."""

    type: Literal[
        "hifloat8", "float8_e4m3fn", "mxfp8_e4m3fn", "mxfp4_e2m1", "float4_e2m1", "int4", "int8"
    ] = Field(description=_words(*sorted(FORMATS)))
    strategy: Literal["tensor", "channel", "group"] = Field(
        description=_words("tensor", "channel", "group")
    )

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, raw: Any) -> Any:
        return _defaults(raw, "channel")


class InputsConfig(_TensorConfig):
    """``quant_cfg.inputs``."""

    type: Literal["hifloat8", "float8_e4m3fn", "mxfp8_e4m3fn", "int8"] = Field(
        description=_words("hifloat8", "float8_e4m3fn", "mxfp8_e4m3fn", "int8")
    )
    strategy: Literal["tensor", "token", "group"] = Field(
        description=_words("tensor", "token", "group")
    )
    dynamic: bool | None = Field(
        default=None,
        description='true with strategy "token" or "group", where scales are always '
        "computed from the data at hand; false otherwise",
    )
    enable_quant: YesNo = True

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, raw: Any) -> Any:
        return _defaults(raw, "tensor")

    @model_validator(mode="after")
    def _token_if_dynamic(self) -> InputsConfig:
        if self.dynamic and self.strategy == "tensor":
            raise ValueError('dynamic true only with strategy "token"')
        return self


@dataclass(frozen=True)
class Override:
    """A block that replaces the common one for the layers whose names a glob matches.

    Attributes:
        pattern: the glob; ``*`` matches dots too.
        block: ``weights`` or ``inputs``.
        value: the block; None: not quantized.
    """

    pattern: str
    block: str
    value: WeightsConfig | InputsConfig | None

    @property
    def key(self) -> str:
        """As it stands in ``quant_cfg``."""
        return f"{self.pattern}.{self.block}"

    def matches(self, layer_name: str) -> bool:
        """Whether it is meant for that layer."""
        return fnmatch.fnmatchcase(layer_name, self.pattern)


@dataclass(frozen=True)
class LayerRequest:
    """What the config asks for one layer.

    Attributes:
        batch_num: batches to calibrate on.
        algorithm: its name.
        options: of the algorithm, with its defaults filled in.
        weights: how weights are quantized.
        inputs: how inputs are quantized; None: not.
    """

    batch_num: int
    algorithm: str
    options: Mapping[str, Any]
    weights: WeightsConfig
    inputs: InputsConfig | None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> LayerRequest:
        """The inverse of `as_dict`."""
        ((algorithm, options),) = raw["algorithm"].items()
        inputs = raw["quant_cfg"].get("inputs")
        return cls(
            raw["batch_num"],
            algorithm,
            options,
            WeightsConfig.model_validate(raw["quant_cfg"]["weights"]),
            None if inputs is None else InputsConfig.model_validate(inputs),
        )

    def as_dict(self) -> dict[str, Any]:
        """As quantize modules get it: the config's own shape, for one layer."""
        blocks: dict[str, Any] = {"weights": self.weights.model_dump(exclude_none=True)}
        if self.inputs is not None:
            blocks["inputs"] = self.inputs.model_dump(exclude_none=True)
        return {
            "batch_num": self.batch_num,
            "quant_cfg": blocks,
            "algorithm": {self.algorithm: dict(self.options)},
        }

    def combination(self, layer: str) -> Combination:
        """In the terms of the table of what is allowed."""
        weights = (self.weights.type, self.weights.strategy, self.weights.symmetric)
        if self.inputs is None:
            return Combination(layer, self.algorithm, *weights)
        inputs = (self.inputs.type, self.inputs.strategy, self.inputs.symmetric)
        return Combination(layer, self.algorithm, *weights, *inputs)


@dataclass(frozen=True)
class LowBitConfig:
    """A checked config.

    Attributes:
        batch_num: batches to calibrate on, at least 1.
        algorithm: its name.
        options: of the algorithm, with its defaults filled in.
        weights: the common block; None where there is none.
        inputs: the common block; None: inputs are not quantized.
        overrides: in the order of the config; the last that matches wins.
        skip_layers: parts of the names of layers that stay as they are.
    """

    batch_num: int
    algorithm: str
    options: Mapping[str, Any]
    weights: WeightsConfig | None
    inputs: InputsConfig | None
    overrides: tuple[Override, ...] = ()
    skip_layers: tuple[str, ...] = ()

    def skipped_by(self, layer_name: str) -> str | None:
        """The entry of `skip_layers` that the name contains, or None."""
        return next((part for part in self.skip_layers if part in layer_name), None)

    def for_layer(self, layer_name: str) -> LayerRequest | None:
        """What is asked for one layer; None if it has no weights block."""
        blocks: dict[str, Any] = {"weights": self.weights, "inputs": self.inputs}
        for override in self.overrides:
            if override.matches(layer_name):
                blocks[override.block] = override.value
        if blocks["weights"] is None:
            return None
        inputs = blocks["inputs"]
        if inputs is not None and not inputs.enable_quant:
            inputs = None
        return LayerRequest(self.batch_num, self.algorithm, self.options, blocks["weights"], inputs)


def parse_low_bit_config(
    config: object, algorithms: Mapping[str, type[BaseModel] | None]
) -> LowBitConfig:
    """Checks a config.

    Args:
        config: what the user gave.
        algorithms: model of the options of each registered algorithm, by name; None: any
            options are handed on as they are.

    Raises:
        ArgumentTypeError: it is not a dict.
        ConfigError: all that is wrong with it, up to ten things.
    """
    if not isinstance(config, Mapping):
        raise ArgumentTypeError(
            f"config is of type {type(config).__name__}; allowed are dict and None"
        )
    problems = ProblemList("config", ConfigError)
    for key in config:
        if key not in KEYS:
            hint = did_you_mean(str(key), KEYS) or f"; allowed: {', '.join(KEYS)}"
            problems.add(f"{shown(key)}: unknown key{hint}")
    batch_num = _batch_num(config.get("batch_num", 1), problems)
    blocks, overrides = _quant_cfg(config.get("quant_cfg"), "quant_cfg" in config, problems)
    name, options = _algorithm(config, algorithms, problems)
    skip_layers = _skip_layers(config.get("skip_layers", ()), problems)
    problems.raise_if_any()
    return LowBitConfig(
        batch_num, name, options, blocks["weights"], blocks["inputs"], overrides, skip_layers
    )


def _batch_num(value: object, problems: ProblemList) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST_BATCH_NUM:
        return value
    problems.add(f"batch_num is {shown(value)}; allowed: an integer from 1 to 2^32 - 1")
    return 1


def _quant_cfg(
    raw: object, given: bool, problems: ProblemList
) -> tuple[dict[str, Any], tuple[Override, ...]]:
    blocks: dict[str, Any] = dict.fromkeys(BLOCKS)
    overrides: list[Override] = []
    if not isinstance(raw, Mapping):
        told = f"is {shown(raw)}" if given else "is missing"
        problems.add(f"quant_cfg {told}; allowed: a dict with the key weights, and inputs")
        return blocks, ()
    for key, value in raw.items():
        pattern, _, block = str(key).rpartition(".")
        if block not in BLOCKS or (not pattern and key != block):
            hint = did_you_mean(block, BLOCKS)
            problems.add(
                f"quant_cfg.{key}: unknown key{hint}; allowed: weights, inputs, and "
                "'<glob of layer names>.weights' or '.inputs'"
            )
            continue
        parsed = _block(value, f"quant_cfg.{key}", block, problems)
        if pattern:
            overrides.append(Override(pattern, block, parsed))
        else:
            blocks[block] = parsed
    if raw and not any(str(key).endswith("weights") for key in raw):
        problems.add("quant_cfg.weights is missing; inputs are quantized only along with weights")
    if not raw:
        problems.add("quant_cfg is empty; allowed: a dict with the key weights, and inputs")
    return blocks, tuple(overrides)


def _block(
    value: object, place: str, block: str, problems: ProblemList
) -> WeightsConfig | InputsConfig | None:
    """One weights or inputs block; None stands for "not quantized"."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        problems.add(f"{place} is {shown(value)}; allowed: a dict, or None for no quantization")
        return None
    model: type[WeightsConfig] | type[InputsConfig]
    model = WeightsConfig if block == "weights" else InputsConfig
    return _validated(model, value, place, problems)


def _validated(
    model: type[Block], value: Mapping[Any, Any], place: str, problems: ProblemList
) -> Block | None:
    unnamed = [key for key in value if not isinstance(key, str)]
    if unnamed:
        problems.add(f"{place} has the key {shown(unnamed[0])}; allowed are strings")
        return None
    try:
        return model.model_validate(dict(value))
    except ValidationError as error:
        whole = [details for details in error.errors() if not details["loc"]]
        for details in whole:
            problems.add(f"{place} is {shown(dict(value))}; allowed: {details['ctx']['error']}")
        if not whole:
            explain(error, model, problems, lambda parts: dotted([place, *parts]))
    return None


def _algorithm(
    config: Mapping[Any, Any],
    algorithms: Mapping[str, type[BaseModel] | None],
    problems: ProblemList,
) -> tuple[str, Mapping[str, Any]]:
    """Name and options from a str, a set or list of one, or a dict of one."""
    known = ", ".join(sorted(algorithms))
    raw = config.get("algorithm")
    options: object = {}
    name: object = raw
    if isinstance(raw, Mapping) and len(raw) == 1:
        ((name, options),) = raw.items()
    elif isinstance(raw, (set, frozenset, list, tuple)) and len(raw) == 1:
        (name,) = raw
    if not isinstance(name, str):
        told = f"is {raw!r}" if "algorithm" in config else "is missing"
        problems.add(
            f"algorithm {told}; allowed: the name of one algorithm, alone, in a set or list, or "
            f"as the key of a dict of its options; there are {known}"
        )
        return "", {}
    if name not in algorithms:
        problems.add(
            f"algorithm is {name!r}{did_you_mean(name, algorithms)}; allowed: {known}, or one "
            "registered with algorithm_register"
        )
        return name, {}
    if options is None:
        options = {}
    if not isinstance(options, Mapping):
        problems.add(f"algorithm.{name} is {shown(options)}; allowed: a dict of options")
        return name, {}
    model = algorithms[name]
    if model is None:
        return name, dict(options)
    extra = model.model_config.get("extra")
    if options and not model.model_fields and extra in (None, "forbid"):
        problems.add(f"algorithm.{name} has no options; given: {', '.join(map(shown, options))}")
        return name, {}
    if extra is None:
        # pydantic lets unknown keys pass unless a model says otherwise.
        model = types.new_class(model.__name__, (model,), {"extra": "forbid"})
    checked = _validated(model, options, f"algorithm.{name}", problems)
    return name, checked.model_dump() if checked is not None else {}


def _skip_layers(raw: object, problems: ProblemList) -> tuple[str, ...]:
    parts: Iterable[object] = ()
    if isinstance(raw, str):
        parts = (raw,)
    elif isinstance(raw, (set, frozenset, list, tuple)):
        parts = raw
    elif raw is not None:
        problems.add(f"skip_layers is {shown(raw)}; allowed: a str, or a list or set of str")
    for part in parts:
        if not isinstance(part, str) or not part:
            # An empty string is part of every name: it would skip the whole model.
            problems.add(f"skip_layers has the entry {shown(part)}; allowed: parts of layer names")
    return tuple(dict.fromkeys(part for part in parts if isinstance(part, str) and part))
