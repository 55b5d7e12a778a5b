"""Modules to place in a user's own network."""

from amct_pytorch.nn.module.quantization.quant_calibration_op import QuantCalibrationOp

__all__ = ["QuantCalibrationOp"]
