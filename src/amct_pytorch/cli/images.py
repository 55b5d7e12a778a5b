"""Photos as a network's input: a preprocessing that is stated, printed and stored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from amct_pytorch.errors import (
    ArgumentValueError,
    CalibrationError,
    ConfigError,
    PackageMissingError,
)
from amct_pytorch.files import read_text

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
PILLOW = "reading images needs Pillow: pip install 'amct-pytorch[images]' (or pip install pillow)"


@dataclass(frozen=True)
class Preprocessing:
    """How a photo becomes a sample: resized, cut, (pixel - mean) / std, arranged.

    Attributes:
        size: height and width of a sample.
        mean: taken from the pixel values, which run from 0 to 255; one number, or one a channel.
        std: what the rest is divided by, likewise.
        crop: ``center``: the photo is resized so that its shorter side is `resize`, and the middle
            is cut out; ``stretch``: it is resized to `size` whatever its shape.
        resize: length of the shorter side before ``center``; None: just as large as needed.
        layout: ``nchw`` or ``nhwc``.
        channels: ``rgb``, ``bgr`` or ``gray``.
        interpolation: ``bilinear`` or ``bicubic``.
    """

    __pydantic_config__ = ConfigDict(allow_inf_nan=False, extra="forbid")

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: Literal["center", "stretch"] = "center"
    resize: int | None = None
    layout: Literal["nchw", "nhwc"] = "nchw"
    channels: Literal["rgb", "bgr", "gray"] = "rgb"
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def __post_init__(self) -> None:
        number = 1 if self.channels == "gray" else 3
        if min(self.size) < 1:
            raise ArgumentValueError(f"size is {self.size}; allowed: 1 or more")
        for what, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, number):
                raise ArgumentValueError(
                    f"{what} has {len(values)} numbers; allowed: 1, or {number} for "
                    f"{self.channels} images"
                )
        if any(value <= 0 for value in self.std):
            raise ArgumentValueError(f"std is {_numbers(self.std)}; allowed: above 0")
        if self.resize is not None and self.resize < min(self.size):
            raise ArgumentValueError(
                f"resize is {self.resize}; allowed: at least the crop's shorter side, "
                f"{min(self.size)}"
            )

    def __str__(self) -> str:
        height, width = self.size
        cut = f"stretched to {height}x{width}"
        if self.crop == "center":
            cut = f"shorter side to {self.resize or 'fit'}, middle {height}x{width}"
        return (
            f"{self.channels}, {cut} ({self.interpolation}), (pixel 0..255 - {_numbers(self.mean)})"
            f" / {_numbers(self.std)}, {self.layout}"
        )

    @property
    def doubt(self) -> str | None:
        """What is probably wrong with it, in words, or None."""
        plain = set(self.mean) == {0} and set(self.std) == {1}  # the pixels as they are
        if plain or max(map(abs, self.mean)) > 1 or max(self.std) > 1:
            return None
        meant = " and ".join(
            f"{what} {','.join(f'{255 * value:g}' for value in values)}"
            for what, values in (("mean", self.mean), ("std", self.std))
        )
        return (
            f"mean {_numbers(self.mean)} and std {_numbers(self.std)} look like those of pixel "
            f"values from 0 to 1; here they run from 0 to 255: times 255, that is {meant}"
        )

    def to_json(self) -> str:
        """JSON text that `preprocessing_from` reads."""
        return json.dumps({"preprocessing": asdict(self)}, indent=4) + "\n"

    def sample(self, file: Path) -> np.ndarray:
        """The sample of one photo, float32 [C, H, W] or [H, W, C].

        Raises:
            PackageMissingError: Pillow is not installed.
            CalibrationError: the file cannot be read as an image.
        """
        try:
            from PIL import Image, UnidentifiedImageError
        except ImportError as error:
            raise PackageMissingError(PILLOW) from error
        try:
            with Image.open(file) as opened:
                photo = opened.convert("L" if self.channels == "gray" else "RGB")
        except (OSError, UnidentifiedImageError, ValueError) as error:
            raise CalibrationError(f"{str(file)!r} cannot be read as an image: {error}") from error
        kind = {
            "bilinear": Image.Resampling.BILINEAR,
            "bicubic": Image.Resampling.BICUBIC,
        }[self.interpolation]
        height, width = self.size
        box = None
        if self.crop == "center":
            box = _middle(photo.width, photo.height, self.size, self.resize)
        pixels = np.asarray(photo.resize((width, height), kind, box=box), np.float32)
        pixels = pixels.reshape(height, width, -1)
        if self.channels == "bgr":
            pixels = pixels[..., ::-1]
        values = (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        if self.layout == "nchw":
            values = values.transpose(2, 0, 1)
        return np.ascontiguousarray(values, np.float32)


def _middle(
    width: int, height: int, size: tuple[int, int], resize: int | None
) -> tuple[float, float, float, float]:
    """The part of the photo that ends up in the crop; resizing it alone is the same."""
    scale = max(size[0] / height, size[1] / width)
    if resize is not None:
        scale = max(scale, resize / min(width, height))
    cut_height, cut_width = size[0] / scale, size[1] / scale
    left, top = (width - cut_width) / 2, (height - cut_height) / 2
    return (max(left, 0), max(top, 0), min(left + cut_width, width), min(top + cut_height, height))


def _numbers(values: Sequence[float]) -> str:
    shown = ", ".join(f"{value:g}" for value in values)
    return shown if len(values) == 1 else f"[{shown}]"


def preprocessing_from(path: Path) -> Preprocessing:
    """What `Preprocessing.to_json` wrote into a file.

    Raises:
        FileMissingError, FileAccessError: the file cannot be read.
        ConfigError: it holds something else.
    """
    try:
        document: Any = json.loads(read_text(path, "--preprocessing"))
        found: Preprocessing = TypeAdapter(Preprocessing).validate_python(
            document["preprocessing"], strict=False
        )
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: preprocessing.{place}: {first['msg']}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} holds no preprocessing; `amct quantize` writes such a file for images"
        ) from error
    return found
