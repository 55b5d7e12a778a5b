"""The config of quantization-aware training: every key with its type, range and default.

Built like `config.models`: a field's `description` is what an error gives as allowed there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from amct_pytorch.config.models import FakequantPrecisionMode, MaybeYesNo, Strict, YesNo, not_null
from amct_pytorch.errors import ConfigError
from amct_pytorch.graph.layers import LAYER_KINDS, SeenLayer

# Layer types whose quantization is trained.
RETRAIN_KINDS = ("Conv1d", "Conv2d", "ConvTranspose1d", "ConvTranspose2d", "Linear")
DST_TYPES = '"INT8" or "INT4" (INT16 is reserved for a later version)'
BITS = {"INT8": 8, "INT4": 4}
# Layers with no more input channels are small, and quantizing them costs more than it gains.
FEW_CHANNELS = 16

DstType = Annotated[Literal["INT8", "INT4"], Field(description=DST_TYPES)]
Clip = Annotated[float | None, BeforeValidator(not_null)]


class DataParams(Strict):
    """A layer's input.

    Attributes:
        algo: a clip range that is learned.
        dst_type: what it is quantized to.
        clip_max: where the range's upper end starts; None: IFMR finds it.
        clip_min: where its lower end starts; None likewise.
        fixed_min: whether the lower end stays 0; None: the graph and the data decide.
    """

    algo: Literal["ulq_quantize"] = Field(default="ulq_quantize", description='"ulq_quantize"')
    dst_type: DstType = "INT8"
    clip_max: Clip = Field(default=None, gt=0, description="a number > 0")
    clip_min: Clip = Field(default=None, lt=0, description="a number < 0")
    fixed_min: MaybeYesNo = None

    @model_validator(mode="after")
    def _both_ends(self) -> DataParams:
        lower = self.clip_min is not None or self.fixed_min is True
        if self.clip_max is not None and not lower:
            raise ValueError("clip_max together with clip_min, or with fixed_min true")
        if self.clip_max is None and self.clip_min is not None:
            raise ValueError("clip_min together with clip_max")
        return self


class RetrainWeightParams(Strict):
    """A layer's weights.

    Attributes:
        algo: "arq_retrain": the scale follows the weights; "ulq_retrain": it is learned.
        channel_wise: whether each output channel has a scale of its own.
        dst_type: what they are quantized to.
    """

    algo: Literal["arq_retrain", "ulq_retrain"] = Field(
        default="arq_retrain", description='"arq_retrain" or "ulq_retrain"'
    )
    channel_wise: YesNo
    dst_type: DstType = "INT8"


class RetrainLayerConfig(Strict):
    """One layer. A layer that is not in a config at all is not quantized either."""

    retrain_enable: YesNo = True
    retrain_data_config: DataParams = DataParams()
    retrain_weight_config: RetrainWeightParams


class RetrainConfig(Strict):
    """The whole config; in the JSON file the layers stand beside the global keys.

    Attributes:
        version: of the file's format.
        batch_num: training batches that the first ranges come from.
        fakequant_precision_mode: "FORCE_FP16_QUANT": input scales keep float16 precision.
        layers: by layer name, in the model's order.
    """

    version: int = Field(default=1, ge=1, le=1, description="1")
    batch_num: int = Field(default=1, ge=1, description="an integer >= 1")
    fakequant_precision_mode: FakequantPrecisionMode = None
    layers: dict[str, RetrainLayerConfig] = Field(default={}, description="an object")

    def enabled_layers(self) -> dict[str, RetrainLayerConfig]:
        """The layers to quantize."""
        return {name: layer for name, layer in self.layers.items() if layer.retrain_enable}


# Keys that stand beside the layers in the JSON file.
RETRAIN_GLOBAL_KEYS = tuple(key for key in RetrainConfig.model_fields if key != "layers")


def retrainable(layers: Sequence[SeenLayer]) -> tuple[SeenLayer, ...]:
    """The layers of a look, with the reason for those whose type is not trained."""
    return tuple(
        replace(layer, reason=f"{layer.kind} is not trained; such are {', '.join(RETRAIN_KINDS)}")
        if layer.reason is None and layer.kind not in RETRAIN_KINDS
        else layer
        for layer in layers
    )


def weights_default(layer: SeenLayer) -> dict[str, Any]:
    """What has no default of its own in a layer's weight block: that of its type."""
    return {"channel_wise": LAYER_KINDS[layer.kind].channel_wise}


def why_not_channel_wise(layer: SeenLayer) -> str | None:
    """Why the layer's weights cannot have a scale for each output channel; None if they can."""
    if LAYER_KINDS[layer.kind].channel_wise:
        return None
    return f"{layer.kind} has one scale for all its weights"


def few_channels(layers: Sequence[SeenLayer], config: RetrainConfig) -> Mapping[str, int]:
    """Enabled layers that are so small that quantizing them is not recommended."""
    return {
        layer.name: layer.in_channels
        for layer in layers
        if layer.name in config.enabled_layers() and layer.in_channels <= FEW_CHANNELS
    }


def check_any_enabled(config: RetrainConfig, source: str) -> None:
    """Refuses a config that asks for nothing.

    Raises:
        ConfigError: no layer is enabled.
    """
    if not config.enabled_layers():
        raise ConfigError(
            f"{source}: no layer is enabled; set retrain_enable of at least one layer to true"
        )
