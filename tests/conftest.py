"""Settings and fixtures that every test shares."""

from __future__ import annotations

import os

# Before torch is imported: OpenMP reads these once. One thread for each xdist worker.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


import pytest
import real_models
import torch
from hypothesis import settings
from photo_crops import PhotoCrops

torch.set_num_threads(1)

# How long an example takes says nothing about what is right: a busy machine fails no test.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def efficientnet_lite0() -> torch.nn.Module:
    """EfficientNet-Lite0 in eval mode; the same object for all tests, so never change it."""
    return real_models.efficientnet_lite0()


@pytest.fixture(scope="session")
def photo_crops() -> PhotoCrops:
    """32 calibration crops and 48 held-out crops (four views of each photo; demo has 16)."""
    heldout = real_models.heldout_crops(views=4)
    return PhotoCrops(real_models.calibration_crops().images, heldout.images, heldout.labels)
