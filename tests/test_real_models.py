"""The real network and photos are what the figures in the docs were measured on."""

from __future__ import annotations

import pytest
import real_models
import torch


def test_crops_have_the_documented_shapes_and_range(photo_crops):
    assert photo_crops.calibration.shape == (32, 3, 224, 224)
    assert photo_crops.heldout.shape == (48, 3, 224, 224)
    assert photo_crops.labels.shape == (48,)
    for images in (photo_crops.calibration, photo_crops.heldout):
        assert images.dtype == torch.float32
        assert images.min() >= (0 - 127) / 128
        assert images.max() <= (255 - 127) / 128


def test_crops_do_not_depend_on_or_touch_the_global_random_state(photo_crops):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    again = real_models.calibration_crops().images
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(again, photo_crops.calibration)


def test_fewer_views_are_the_first_of_more(photo_crops):
    fewer = real_models.heldout_crops(views=2)
    assert torch.equal(fewer.images.view(12, 2, -1), photo_crops.heldout.view(12, 4, -1)[:, :2])


def test_float_network_recognises_the_held_out_photos(efficientnet_lite0, photo_crops):
    assert not efficientnet_lite0.training
    with torch.inference_mode():
        logits = torch.cat([efficientnet_lite0(batch) for batch in photo_crops.heldout.split(8)])
    top1 = (logits.argmax(1) == photo_crops.labels).float().mean().item()
    # 18 of the 20 photos are right; a wrong preprocessing or wrong weights fall far below.
    assert top1 >= 0.8


def test_a_missing_package_says_what_to_install():
    with pytest.raises(real_models.MissingAsset, match=r"make demo.*requirements\.txt"):
        real_models.package_folder("no_such_package_anywhere")
