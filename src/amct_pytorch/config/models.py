"""The calibration config: every key with its type, its range and its default.

A field's `description` is the text that an error gives as what is allowed there. Fields stand
in the order in which the JSON file has them; the first of a variant names the variant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

T = TypeVar("T")


def _require(condition: Callable[[T], bool]) -> AfterValidator:
    """A validator that accepts what fulfils `condition`."""

    def check(value: T) -> T:
        if not condition(value):
            raise PydanticCustomError("not_allowed", "not allowed")
        return value

    return AfterValidator(check)


def not_null(value: object) -> object:
    """None means "not given"; a file says that by leaving the key out."""
    if value is None:
        raise PydanticCustomError("not_allowed", "not allowed")
    return value


def _as_pair(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def tag(key: str, default: str) -> Discriminator:
    """Chooses the variant of a block by its `key`; without one, `default`."""

    def choose(value: Any) -> Any:
        if isinstance(value, dict):
            return value.get(key, default)
        return getattr(value, key, default)

    return Discriminator(choose)


Pair = Annotated[tuple[float, float], BeforeValidator(_as_pair)]
YesNo = Annotated[bool, Field(description="true or false")]
MaybeYesNo = Annotated[bool | None, BeforeValidator(not_null), Field(description="true or false")]
Percentile = Annotated[float, Field(gt=0.5, le=1, description="a number in (0.5, 1]")]
Fraction = Annotated[float, Field(gt=0, lt=1, description="a number in (0, 1)")]
ActivationBits = Annotated[
    int, _require(lambda n: n == 8), Field(description="8 (16 is not supported in this version)")
]
WeightBits = Annotated[
    int, _require(lambda n: n in (4, 6, 7, 8)), Field(description="8, 7, 6 or 4")
]
FakequantPrecisionMode = Annotated[
    Literal["FORCE_FP16_QUANT"] | None,
    BeforeValidator(not_null),
    Field(description='"FORCE_FP16_QUANT", or no such key'),
]
BinCount = Annotated[
    int,
    _require(lambda n: n in (1024, 2048, 4096, 8192)),
    Field(description="1024, 2048, 4096 or 8192"),
]
SearchRange = Annotated[
    Pair,
    _require(lambda pair: 0 < pair[0] < pair[1]),
    Field(description="[start, end] with 0 < start < end"),
]
BetaRange = Annotated[
    Pair,
    _require(lambda pair: pair[0] > pair[1] > 0),
    Field(description="[start, end] with start > end > 0"),
]
ACT_ALGOS = '"ifmr" or "hfmg"'
WTS_ALGOS = '"arq_quantize" or "ada_quantize"'


class Strict(BaseModel):
    """Base of config models: no conversions, no unknown keys, no NaN, no changes afterwards."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class _IfmrHead(Strict):
    act_algo: Literal["ifmr"] = Field(default="ifmr", description=ACT_ALGOS)
    num_bits: ActivationBits
    asymmetric: MaybeYesNo = None


class IfmrSearch(Strict):
    """What IFMR tries."""

    max_percentile: Percentile = 0.999999
    min_percentile: Percentile = 0.999999
    search_range: SearchRange = (0.7, 1.3)
    search_step: float = Field(
        default=0.01,
        gt=0,
        validate_default=True,
        description="a number in (0, end - start of search_range]",
    )

    @field_validator("search_step")
    @classmethod
    def _fits_the_range(cls, step: float, info: ValidationInfo) -> float:
        if "search_range" in info.data:
            start, end = info.data["search_range"]
            # The slack is for decimals: 1.0 - 0.9 is a little below 0.1 in binary.
            if step > (end - start) + 1e-9 * end:
                raise ValueError(f"a number in (0, {end - start:.6g}], end - start of search_range")
        return step


# Fields of the last base come first.
class IfmrParams(IfmrSearch, _IfmrHead):
    """Activations by IFMR; `asymmetric` None: the config's `activation_offset` decides."""


class HfmgParams(Strict):
    """Activations by HFMG; `asymmetric` None: the config's `activation_offset` decides."""

    act_algo: Literal["hfmg"] = Field(default="hfmg", description=ACT_ALGOS)
    num_bits: ActivationBits
    asymmetric: MaybeYesNo = None
    num_of_bins: BinCount = 4096


class ArqParams(Strict):
    """Weights by ARQ."""

    wts_algo: Literal["arq_quantize"] = Field(default="arq_quantize", description=WTS_ALGOS)
    num_bits: WeightBits
    channel_wise: YesNo


class AdaParams(Strict):
    """Weights by ADA."""

    wts_algo: Literal["ada_quantize"] = Field(default="ada_quantize", description=WTS_ALGOS)
    num_iteration: int = Field(default=10000, ge=0, description="an integer >= 0")
    reg_param: Fraction = 0.01
    beta_range: BetaRange = (20.0, 2.0)
    warm_start: Fraction = 0.2
    num_bits: WeightBits
    channel_wise: YesNo


ActivationParams = Annotated[
    Annotated[IfmrParams, Tag("ifmr")] | Annotated[HfmgParams, Tag("hfmg")],
    tag("act_algo", "ifmr"),
]
WeightParams = Annotated[
    Annotated[ArqParams, Tag("arq_quantize")] | Annotated[AdaParams, Tag("ada_quantize")],
    tag("wts_algo", "arq_quantize"),
]


class LayerConfig(Strict):
    """One layer. A layer that is not in a config at all is not quantized either.

    Attributes:
        quant_enable: whether to quantize it.
        dmq_balancer_param: migration strength; None: no balancing.
        activation_quant_params: how its input is quantized.
        weight_quant_params: how its weights are quantized.
    """

    quant_enable: YesNo = True
    dmq_balancer_param: Annotated[
        float | None,
        BeforeValidator(not_null),
        Field(ge=0.2, le=0.8, description="a number in [0.2, 0.8]"),
    ] = None
    activation_quant_params: ActivationParams
    weight_quant_params: WeightParams


class CalibrationConfig(Strict):
    """The whole config; in the JSON file the layers stand beside the global keys.

    Attributes:
        version: of the file's format.
        batch_num: forward passes that calibration observes.
        activation_offset: whether inputs get a zero point where `asymmetric` does not say.
        do_fusion: whether Conv+BN is fused first.
        fakequant_precision_mode: "FORCE_FP16_QUANT": input scales keep float16 precision.
        skip_fusion_layers: layers whose BN is not fused.
        bias_correction: whether each layer's mean output error is taken out of its bias.
        cross_layer_equalization: whether weights of neighbouring layers are made equally large.
        linear_channel_wise: whether Linear layers may, and by default do, have one weight scale
            for each output channel.
        layers: by layer name.
    """

    version: int = Field(default=1, ge=1, le=1, description="1")
    batch_num: int = Field(default=1, ge=1, description="an integer >= 1")
    activation_offset: YesNo = True
    do_fusion: YesNo = True
    fakequant_precision_mode: FakequantPrecisionMode = None
    skip_fusion_layers: list[str] = Field(default=[], description="a list of layer names")
    bias_correction: YesNo = True
    cross_layer_equalization: YesNo = False
    linear_channel_wise: YesNo = False
    layers: dict[str, LayerConfig] = Field(default={}, description="an object")

    def asymmetric(self, layer_name: str) -> bool:
        """Whether the layer's input gets a zero point."""
        own = self.layers[layer_name].activation_quant_params.asymmetric
        return self.activation_offset if own is None else own

    def enabled_layers(self) -> dict[str, LayerConfig]:
        """The layers to quantize."""
        return {name: layer for name, layer in self.layers.items() if layer.quant_enable}


# Keys that stand beside the layers in the JSON file.
GLOBAL_KEYS = tuple(key for key in CalibrationConfig.model_fields if key != "layers")
