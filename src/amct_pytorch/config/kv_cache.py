"""The config of KV-cache calibration: its keys, and which layers of a model it may name.

Fields stand in the order in which the JSON file has them, as in `config.models`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, Tag, ValidationError
from torch import nn

from amct_pytorch.config.explain import explain
from amct_pytorch.config.models import (
    ACT_ALGOS,
    ActivationBits,
    BinCount,
    IfmrSearch,
    MaybeYesNo,
    Strict,
    YesNo,
    tag,
)
from amct_pytorch.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    ConfigError,
    ProblemList,
    did_you_mean,
    shown,
)

PER_TENSOR: Final = 0
PER_CHANNEL: Final = 1
GRANULARITIES = {"per_tensor": PER_TENSOR, "per_channel": PER_CHANNEL}
# Keys under which `quant_layers` may name the layers.
LAYER_LISTS = ("kv_cache_quant_layers", "kv_cache_quant")
WILDCARDS = "*?["


class _IfmrHead(Strict):
    act_algo: Literal["ifmr"] = Field(default="ifmr", description=ACT_ALGOS)
    asymmetric: MaybeYesNo = None


class _HfmgHead(Strict):
    act_algo: Literal["hfmg"] = Field(default="hfmg", description=ACT_ALGOS)
    asymmetric: MaybeYesNo = None
    num_of_bins: BinCount = 4096


class _Granularity(Strict):
    quant_granularity: Literal[0, 1] = Field(
        default=PER_TENSOR, description="0 (per tensor) or 1 (per channel)"
    )


# Fields of the last base come first.
class KvIfmrParams(_Granularity, IfmrSearch, _IfmrHead):
    """IFMR; `asymmetric` None: the config's `activation_offset` decides."""


class KvHfmgParams(_Granularity, _HfmgHead):
    """HFMG; `asymmetric` None: the config's `activation_offset` decides."""


KvParams = Annotated[
    Annotated[KvIfmrParams, Tag("ifmr")] | Annotated[KvHfmgParams, Tag("hfmg")],
    tag("act_algo", "ifmr"),
]


class KvLayerConfig(Strict):
    """One layer.

    Attributes:
        kv_data_quant_config: how its output is quantized.
    """

    kv_data_quant_config: KvParams = Field(default_factory=KvIfmrParams)


class KvCacheConfig(Strict):
    """The whole config; in the JSON file the layers stand beside the global keys.

    Attributes:
        batch_num: forward passes that calibration observes.
        activation_offset: whether outputs get a zero point where `asymmetric` does not say.
        layers: by layer name.
    """

    batch_num: int = Field(default=1, ge=1, description="an integer >= 1")
    activation_offset: YesNo = True
    layers: dict[str, KvLayerConfig] = Field(default={}, description="an object")

    def asymmetric(self, layer_name: str) -> bool:
        """Whether the layer's output gets a zero point."""
        own = self.layers[layer_name].kv_data_quant_config.asymmetric
        return self.activation_offset if own is None else own


KV_GLOBAL_KEYS = tuple(key for key in KvCacheConfig.model_fields if key != "layers")


def _granularity(value: object) -> object:
    if isinstance(value, str):
        return GRANULARITIES.get(value, {"0": 0, "1": 1}.get(value, value))
    return value


class _OpKeys(Strict):
    num_bits: ActivationBits = 8
    with_offset: YesNo = True
    batch_num: int = Field(default=1, ge=1, description="an integer >= 1")
    quant_granularity: Annotated[Literal[0, 1], BeforeValidator(_granularity)] = Field(
        default=PER_TENSOR,
        description='0, "0" or "per_tensor"; 1, "1" or "per_channel"',
    )


class _OpIfmr(_OpKeys, KvIfmrParams):
    """IFMR, as an operator's parameters ask for it."""


class _OpHfmg(_OpKeys, KvHfmgParams):
    """HFMG, as an operator's parameters ask for it."""


class _OpParams(Strict):
    quant_algo_params: Annotated[
        Annotated[_OpIfmr, Tag("ifmr")] | Annotated[_OpHfmg, Tag("hfmg")],
        tag("act_algo", "ifmr"),
    ]


def operator_params(raw: Mapping[str, Any] | None) -> tuple[KvParams, int, bool]:
    """The `quant_algo_params` of a QuantCalibrationOp.

    Args:
        raw: the dict that the user gave; None: all defaults.

    Returns:
        How to quantize, the number of batches to observe, and whether there is a zero point.

    Raises:
        ArgumentTypeError: `raw` is no dict.
        ArgumentValueError: unknown keys or values that are not allowed, all in one error.
    """
    if raw is not None and not isinstance(raw, Mapping):
        raise ArgumentTypeError(f"quant_algo_params is {shown(raw)}; allowed: a dict, or None")
    problems = ProblemList("QuantCalibrationOp", ArgumentValueError)
    try:
        params = _OpParams.model_validate({"quant_algo_params": dict(raw or {})}).quant_algo_params
    except ValidationError as error:
        explain(error, _OpParams, problems)
        problems.raise_if_any()
        raise
    asymmetric = params.with_offset if params.asymmetric is None else params.asymmetric
    return params, params.batch_num, asymmetric


def linear_names(model: nn.Module) -> dict[str, str]:
    """The class name of every module of a model by its path, Linears as ``Linear``."""
    return {
        name: "Linear" if isinstance(module, nn.Linear) else type(module).__name__
        for name, module in model.named_modules()
    }


def layer_problem(name: str, modules: Mapping[str, str]) -> str | None:
    """Why a name is none of a layer whose output can be calibrated; None if it is one."""
    if name in KV_GLOBAL_KEYS:
        return f"{name}: its name is a key of the config file; rename the module"
    if name not in modules or not name:
        linears = [other for other, kind in modules.items() if kind == "Linear"]
        return f"{name}: the model has no such layer{did_you_mean(name, linears)}"
    if modules[name] != "Linear":
        return f"{name}: it is a {modules[name]}; allowed: Linear"
    return None


def expanded(
    names: Iterable[str], modules: Mapping[str, str], place: str, problems: ProblemList
) -> list[str]:
    """The layers that names and patterns (``*.k_proj``) stand for, each once, in their order.

    Args:
        names: layer names, or patterns with ``*``, ``?`` or ``[...]``.
        modules: what `linear_names` returned.
        place: where they stand, for messages.
        problems: gets names of no Linear, and patterns that fit none.
    """
    found: dict[str, None] = {}
    for name in names:
        problem = layer_problem(name, modules)
        if problem is None:
            found[name] = None
        elif name in modules or not any(mark in name for mark in WILDCARDS):
            problems.add(f"{place}: {problem}")
        else:
            fitting = [
                other
                for other, kind in modules.items()
                if kind == "Linear" and other and fnmatch.fnmatchcase(other, name)
            ]
            if not fitting:
                problems.add(f"{place}: {name} fits no Linear of the model")
            found.update(dict.fromkeys(fitting))
    return list(found)


def default_kv_cache_config(quant_layers: object, model: nn.Module) -> KvCacheConfig:
    """IFMR per tensor for the layers that `quant_layers` names.

    Args:
        quant_layers: ``{'kv_cache_quant_layers': [name or pattern, …]}``; the key
            ``kv_cache_quant`` is accepted too.
        model: the model they are layers of.

    Raises:
        ArgumentTypeError: it is no such dict.
        ArgumentValueError: it names nothing, or what is no Linear of the model.
    """
    allowed = "a dict {'kv_cache_quant_layers': [layer names]}"
    if not isinstance(quant_layers, Mapping):
        raise ArgumentTypeError(
            f"quant_layers is {shown(quant_layers)}; allowed: {allowed}, or give config_defination"
        )
    problems = ProblemList("quant_layers", ArgumentValueError)
    modules = linear_names(model)
    names: dict[str, None] = {}
    for key, value in quant_layers.items():
        if key not in LAYER_LISTS:
            hint = did_you_mean(str(key), LAYER_LISTS)
            problems.add(f"{shown(key)}: unknown key{hint}; allowed: {', '.join(LAYER_LISTS)}")
        elif not isinstance(value, (list, tuple)) or not all(isinstance(n, str) for n in value):
            raise ArgumentTypeError(
                f"quant_layers[{key!r}] is {shown(value)}; allowed: a list of layer names"
            )
        else:
            names.update(dict.fromkeys(expanded(value, modules, key, problems)))
    problems.raise_if_any()
    if not names:
        raise ArgumentValueError(f"quant_layers names no layer; allowed: {allowed}")
    return KvCacheConfig(layers={name: KvLayerConfig() for name in modules if name in names})


def globals_of(raw: dict[str, Any], problems: ProblemList) -> KvCacheConfig:
    """A config of the global keys only; the default where a problem was added."""
    try:
        return KvCacheConfig.model_validate(raw)
    except ValidationError as error:
        explain(error, KvCacheConfig, problems)
        return KvCacheConfig()


def check_any_layer(config: KvCacheConfig, source: str) -> None:
    """Refuses a config that names no layer.

    Raises:
        ConfigError: it names none.
    """
    if not config.layers:
        raise ConfigError(f"{source}: no layer is named; allowed: at least one Linear")
