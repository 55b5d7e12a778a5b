"""A documented import path; the code is in `amct_pytorch.distillation`."""

from amct_pytorch.distillation.samples import DistillSampleBase

__all__ = ["DistillSampleBase"]
