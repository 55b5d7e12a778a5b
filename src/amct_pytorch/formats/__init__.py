"""Number formats as values: their ranges, their rounding, their packing."""

from collections.abc import Mapping
from types import MappingProxyType

from amct_pytorch.formats.base import NumberFormat
from amct_pytorch.formats.float4 import Float4E2M1
from amct_pytorch.formats.float8 import Float8E4M3
from amct_pytorch.formats.granularity import Granularity
from amct_pytorch.formats.hifloat8 import HiFloat8
from amct_pytorch.formats.integer import INT8, IntFormat
from amct_pytorch.formats.microscaling import BLOCK_SIZE, MicroscalingFormat
from amct_pytorch.formats.quantizer import (
    QuantParams,
    dequantize,
    fake_quantize,
    params_of,
    quantize,
    scale_from_range,
)

_ALL: tuple[NumberFormat, ...] = (
    IntFormat(4),
    INT8,
    Float8E4M3(),
    Float4E2M1(),
    MicroscalingFormat(Float8E4M3()),
    MicroscalingFormat(Float4E2M1()),
    HiFloat8(),
)

FORMATS: Mapping[str, NumberFormat] = MappingProxyType({fmt.name: fmt for fmt in _ALL})
"""The formats of the configs, by name."""

__all__ = [
    "BLOCK_SIZE",
    "FORMATS",
    "INT8",
    "Granularity",
    "IntFormat",
    "MicroscalingFormat",
    "NumberFormat",
    "QuantParams",
    "dequantize",
    "fake_quantize",
    "params_of",
    "quantize",
    "scale_from_range",
]
