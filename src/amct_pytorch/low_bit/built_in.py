"""The algorithms that come with the package: one line each."""

from __future__ import annotations

from torch import nn

from amct_pytorch.low_bit.base_module import BaseQuantizeModule
from amct_pytorch.low_bit.deploy_linear import LowBitLinear
from amct_pytorch.low_bit.gptq import GptqLinear
from amct_pytorch.low_bit.minmax import MinMaxLinear

# name, class name of the layer, quantize module, deploy module
BUILT_IN: tuple[tuple[str, str, type[BaseQuantizeModule], type[nn.Module]], ...] = (
    ("gptq", "Linear", GptqLinear, LowBitLinear),
    ("minmax", "Linear", MinMaxLinear, LowBitLinear),
)
