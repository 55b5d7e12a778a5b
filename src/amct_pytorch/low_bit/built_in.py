"""The algorithms that come with the package: one line each."""

from __future__ import annotations

from torch import nn

from amct_pytorch.low_bit.awq import AwqLinear
from amct_pytorch.low_bit.base_module import BaseQuantizeModule
from amct_pytorch.low_bit.cast import CastDeployLinear, CastLinear
from amct_pytorch.low_bit.deploy_conv import LowBitConv2d
from amct_pytorch.low_bit.deploy_linear import LowBitLinear
from amct_pytorch.low_bit.gptq import GptqLinear
from amct_pytorch.low_bit.minmax import MinMaxLinear
from amct_pytorch.low_bit.mxquant import MxQuantLinear
from amct_pytorch.low_bit.ofmr import OfmrConv2d, OfmrLinear
from amct_pytorch.low_bit.quantile import QuantileLinear
from amct_pytorch.low_bit.smoothquant import SmoothQuantLinear

# name, class name of the layer, quantize module, deploy module
BUILT_IN: tuple[tuple[str, str, type[BaseQuantizeModule], type[nn.Module]], ...] = (
    ("gptq", "Linear", GptqLinear, LowBitLinear),
    ("minmax", "Linear", MinMaxLinear, LowBitLinear),
    ("awq", "Linear", AwqLinear, LowBitLinear),
    ("smoothquant", "Linear", SmoothQuantLinear, LowBitLinear),
    ("ofmr", "Linear", OfmrLinear, LowBitLinear),
    ("ofmr", "Conv2d", OfmrConv2d, LowBitConv2d),
    ("mxquant", "Linear", MxQuantLinear, LowBitLinear),
    ("cast", "Linear", CastLinear, CastDeployLinear),
    ("quantile", "Linear", QuantileLinear, LowBitLinear),
)
