"""The photos that tests on the real network share."""

from __future__ import annotations

from typing import NamedTuple

import torch


class PhotoCrops(NamedTuple):
    """Crops of eight photos to calibrate on, and of the other twelve, labelled, to test on."""

    calibration: torch.Tensor
    heldout: torch.Tensor
    labels: torch.Tensor
