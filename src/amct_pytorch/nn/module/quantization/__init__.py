"""Modules to place in a user's own network."""

from amct_pytorch.nn.module.quantization.conv1d import Conv1dQAT
from amct_pytorch.nn.module.quantization.conv2d import Conv2dQAT
from amct_pytorch.nn.module.quantization.conv3d import Conv3dQAT
from amct_pytorch.nn.module.quantization.conv_transpose_1d import ConvTranspose1dQAT
from amct_pytorch.nn.module.quantization.conv_transpose_2d import ConvTranspose2dQAT
from amct_pytorch.nn.module.quantization.linear import LinearQAT
from amct_pytorch.nn.module.quantization.quant_calibration_op import QuantCalibrationOp

__all__ = [
    "Conv1dQAT",
    "Conv2dQAT",
    "Conv3dQAT",
    "ConvTranspose1dQAT",
    "ConvTranspose2dQAT",
    "LinearQAT",
    "QuantCalibrationOp",
]
