"""A documented import path of `BaseQuantizeModule`."""

from amct_pytorch.low_bit.base_module import BaseQuantizeModule

__all__ = ["BaseQuantizeModule"]
