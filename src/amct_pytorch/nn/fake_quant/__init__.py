"""Quantizers that are trained: what every retraining flow puts on inputs and on weights."""

from amct_pytorch.nn.fake_quant.activation import ActivationFakeQuant
from amct_pytorch.nn.fake_quant.weight import WeightFakeQuant

__all__ = ["ActivationFakeQuant", "WeightFakeQuant"]
