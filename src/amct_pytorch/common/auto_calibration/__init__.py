"""A documented import path; the code is in `amct_pytorch.auto_calibration`."""

from amct_pytorch.auto_calibration.evaluator import AutoCalibrationEvaluatorBase
from amct_pytorch.auto_calibration.sensitivity import (
    CosineSimilaritySensitivity,
    SensitivityBase,
)
from amct_pytorch.auto_calibration.strategy import (
    AutoCalibrationStrategyBase,
    BinarySearchStrategy,
)

__all__ = [
    "AutoCalibrationEvaluatorBase",
    "AutoCalibrationStrategyBase",
    "BinarySearchStrategy",
    "CosineSimilaritySensitivity",
    "SensitivityBase",
]
