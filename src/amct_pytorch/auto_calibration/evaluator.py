"""What the search asks about a model: the base class of users' evaluators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import nn


class AutoCalibrationEvaluatorBase(ABC):
    """How to calibrate a model, how good it is, and whether that is good enough.

    Example::

        class Top1(AutoCalibrationEvaluatorBase):
            def calibration(self, model):
                for images in calibration_batches:
                    model(images)

            def evaluate(self, model):
                return accuracy(model, validation_set)

            def metric_eval(self, original_metric, new_metric):
                loss = original_metric - new_metric
                return loss <= 0.01, loss
    """

    @abstractmethod
    def calibration(self, model: nn.Module) -> Any:
        """Runs the calibration batches through `model`; what it returns is not looked at."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> Any:
        """The metric of `model`, of any type that `metric_eval` understands."""

    @abstractmethod
    def metric_eval(self, original_metric: Any, new_metric: Any) -> tuple[bool, float]:
        """Compares the float model's metric with another's.

        Returns:
            Whether the other is good enough, and what was lost (lower is better).
        """
