"""A documented import path; the code is in `amct_pytorch.auto_channel_prune.sensitivity`."""

from amct_pytorch.auto_channel_prune.sensitivity import SensitivityBase

__all__ = ["SensitivityBase"]
