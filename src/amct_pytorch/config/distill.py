"""The config of block-wise distillation: every key with its type, range and default."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from amct_pytorch.config.models import Strict, YesNo
from amct_pytorch.config.retrain import DataParams, DstType

# Layer types whose quantization is distilled.
DISTILL_KINDS = ("Conv2d", "Conv3d", "ConvTranspose2d", "Linear")


class DistillWeightParams(Strict):
    """A layer's weights.

    Attributes:
        algo: "arq_distill": the scale follows the weights; "ulq_distill": it is learned.
        channel_wise: whether each output channel has a scale of its own.
        dst_type: what they are quantized to.
    """

    algo: Literal["arq_distill", "ulq_distill"] = Field(
        default="arq_distill", description='"arq_distill" or "ulq_distill"'
    )
    channel_wise: YesNo
    dst_type: DstType = "INT8"


class DistillLayerConfig(Strict):
    """One layer. A layer that is not in a config at all is not quantized either.

    Attributes:
        quant_enable: whether it is quantized; if not, it takes part in distillation in float.
        distill_data_config: how its input is quantized.
        distill_weight_config: how its weights are quantized.
    """

    quant_enable: YesNo = True
    distill_data_config: DataParams = DataParams()
    distill_weight_config: DistillWeightParams


class DistillConfig(Strict):
    """The whole config; in the JSON file the layers stand beside the global keys.

    Attributes:
        version: of the file's format.
        batch_num: batches that the first ranges come from.
        group_size: units (a layer with its BatchNorm and activation) in a block that is found.
        data_dump: whether tensors between blocks are kept on disk.
        distill_group: the layers of each block, in the order in which they run.
        layers: by layer name, in the model's order.
    """

    version: int = Field(default=1, ge=1, le=1, description="1")
    batch_num: int = Field(default=1, ge=1, description="an integer >= 1")
    group_size: int = Field(default=1, ge=1, description="an integer >= 1")
    data_dump: YesNo = False
    distill_group: list[list[str]] = Field(
        default=[], description="a list of lists of layer names, one list a block"
    )
    layers: dict[str, DistillLayerConfig] = Field(default={}, description="an object")

    def enabled_layers(self) -> dict[str, DistillLayerConfig]:
        """The layers to quantize."""
        return {name: layer for name, layer in self.layers.items() if layer.quant_enable}


# Keys that stand beside the layers in the JSON file.
DISTILL_GLOBAL_KEYS = tuple(key for key in DistillConfig.model_fields if key != "layers")
