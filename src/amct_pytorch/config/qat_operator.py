"""The config of one quantization-aware operator: its keys, ranges and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator

from amct_pytorch.config.explain import explain
from amct_pytorch.config.models import MaybeYesNo, Strict, YesNo
from amct_pytorch.errors import ArgumentTypeError, ConfigError, ProblemList, shown

BITS = {"INT8": 8, "INT4": 4}
DST_TYPES = '"INT8" or "INT4"'
DstType = Annotated[Literal["INT8", "INT4"], Field(description=DST_TYPES)]
CLIP_MAX = "a number > 0, or None"
CLIP_MIN = "a number < 0, or None"


def _same_algorithm(value: object) -> object:
    return "ulq_retrain" if value == "ulq_quantize" else value


class DataConfig(Strict):
    """How the operator's input is quantized.

    Attributes:
        dst_type: integers it is quantized to.
        batch_num: training batches that are observed before clip values start.
        fixed_min: whether the range begins at 0; None: if the least value observed is 0.
        clip_min: lower end to start from, < 0; None: as observed.
        clip_max: upper end to start from, > 0; None: as observed.
    """

    dst_type: DstType = "INT8"
    batch_num: int = Field(default=1, ge=1, description="an integer >= 1")
    fixed_min: bool | None = Field(default=False, description="true, false, or None")
    clip_min: float | None = Field(default=None, lt=0, description=CLIP_MIN)
    clip_max: float | None = Field(default=None, gt=0, description=CLIP_MAX)

    @property
    def bits(self) -> int:
        """Bits of the integers."""
        return BITS[self.dst_type]


class OperatorWeightConfig(Strict):
    """How the operator's weight is quantized; `channel_wise` None: the operator's default."""

    dst_type: DstType = "INT8"
    weights_retrain_algo: Annotated[
        Literal["arq_retrain", "ulq_retrain"],
        BeforeValidator(_same_algorithm),
        Field(description='"arq_retrain" or "ulq_retrain"'),
    ] = "arq_retrain"
    channel_wise: MaybeYesNo = None

    @field_validator("channel_wise")
    @classmethod
    def _where_there_is_one(cls, value: bool | None, info: ValidationInfo) -> bool | None:
        if value and info.context is not None and not info.context["channel_wise"]:
            raise ValueError(f"false: {info.context['operator']} has one scale for its weight")
        return value

    @property
    def bits(self) -> int:
        """Bits of the integers."""
        return BITS[self.dst_type]


class OperatorConfig(Strict):
    """The whole config of one operator; every key may be left out.

    Attributes:
        retrain_enable: whether to quantize at all.
        retrain_data_config: of the input.
        retrain_weight_config: of the weight.
    """

    retrain_enable: YesNo = True
    retrain_data_config: DataConfig = Field(default=DataConfig(), description="a dict")
    retrain_weight_config: OperatorWeightConfig = Field(
        default=OperatorWeightConfig(), description="a dict"
    )


def operator_config(raw: object, operator: str, *, channel_wise: bool) -> OperatorConfig:
    """The config that a user gave to an operator.

    Args:
        raw: a dict; None: all defaults.
        operator: its class, for messages.
        channel_wise: whether it can have a scale for each output channel.

    Raises:
        ArgumentTypeError: `raw` is no dict.
        ConfigError: unknown keys or values that are not allowed, all in one error.
    """
    if raw is not None and not isinstance(raw, Mapping):
        raise ArgumentTypeError(f"{operator}: config is {shown(raw)}; allowed: a dict, or None")
    problems = ProblemList(f"config of {operator}", ConfigError)
    context: dict[str, Any] = {"operator": operator, "channel_wise": channel_wise}
    try:
        return OperatorConfig.model_validate(_plain(raw or {}), context=context)
    except ValidationError as error:
        explain(error, OperatorConfig, problems)
        problems.raise_if_any()
        raise


def _plain(value: Any) -> Any:
    """Mappings as dicts."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value
