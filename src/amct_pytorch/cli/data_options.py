"""The options with which subcommands take data."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from amct_pytorch.cli.data import Data, InputSpec
    from amct_pytorch.cli.images import Preprocessing

_NAMES = (
    "sources", "batch_size", "bin_shapes", "bin_dtypes", "preprocessing_file", "size", "mean",
    "std", "crop", "resize", "layout", "channels", "interpolation",
)  # fmt: skip
_OF_IMAGES = {
    "preprocessing_file": "--preprocessing",
    **{name: f"--{name}" for name in _NAMES[_NAMES.index("size") :]},
}


def data_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options; the function gets them as one dict, `data`."""

    @functools.wraps(function)
    def call(*args: Any, **given: Any) -> Any:
        data = {name: given.pop(name) for name in _NAMES}
        return function(*args, data=data, **given)

    options = (
        click.option(
            "--data",
            "sources",
            multiple=True,
            required=True,
            metavar="[NAME=]PATH",
            help="Folder or file with the data: images, .npy, .npz or raw .bin; for a model with "
            "several inputs once for each.",
        ),
        click.option(
            "--batch-size",
            type=click.IntRange(1),
            help="Samples of a batch [default: the model's own where it is fixed, else 8].",
        ),
        click.option(
            "--shape",
            "bin_shapes",
            metavar="NAME:N,C,H,W[;...]",
            help="Shape of one .bin file, as ModelEvaluator takes it.",
        ),
        click.option(
            "--dtype",
            "bin_dtypes",
            metavar="TYPE[;...]",
            help="Element type of .bin files [default: the model's own, else float32].",
        ),
        click.option("--mean", metavar="X[,X,X]", help="Images: taken from pixel values 0..255."),
        click.option("--std", metavar="X[,X,X]", help="Images: what the rest is divided by."),
        click.option("--size", metavar="H[,W]", help="Images: size [default: the model's own]."),
        click.option(
            "--crop",
            type=click.Choice(["center", "stretch"]),
            help="Images: cut out the middle, or squeeze the whole photo [default: center].",
        ),
        click.option("--resize", type=int, help="Images: shorter side before the crop."),
        click.option(
            "--layout", type=click.Choice(["nchw", "nhwc"]), help="Images [default: nchw]."
        ),
        click.option(
            "--channels", type=click.Choice(["rgb", "bgr", "gray"]), help="Images [default: rgb]."
        ),
        click.option(
            "--interpolation",
            type=click.Choice(["bilinear", "bicubic"]),
            help="Images [default: bilinear].",
        ),
        click.option(
            "--preprocessing",
            "preprocessing_file",
            type=click.Path(path_type=Path),
            help="Images: all of this from a file that `amct quantize` wrote.",
        ),
    )
    for option in reversed(options):
        call = option(call)
    return call


def preprocessing_of(data: dict[str, Any], inputs: list[InputSpec]) -> Preprocessing | None:
    """The preprocessing of images that the options state; None where they state none.

    Raises:
        ArgumentValueError, FileMissingError, ConfigError: an option is wrong, or is missing.
    """
    from amct_pytorch.cli.images import preprocessing_from
    from amct_pytorch.errors import ArgumentValueError

    keys = ("crop", "resize", "layout", "channels", "interpolation")
    stated = {key: data[key] for key in keys if data[key] is not None}
    for key in ("mean", "std"):
        if data[key] is not None:
            stated[key] = _floats(data[key], f"--{key}")
    if data["size"] is not None:
        sizes = _floats(data["size"], "--size")
        if len(sizes) not in (1, 2) or not all(map(float.is_integer, sizes)):
            raise ArgumentValueError(
                f"--size is {data['size']!r}; allowed: H or H,W, whole numbers"
            )
        stated["size"] = (int(sizes[0]), int(sizes[-1]))
    if data["preprocessing_file"] is not None:
        return _of_options({**vars(preprocessing_from(data["preprocessing_file"])), **stated})
    if "mean" not in stated and "std" not in stated:
        return None
    for key in ("mean", "std"):
        if key not in stated:
            raise ArgumentValueError(f"--{key} is missing; for images both --mean and --std count")
    if "size" not in stated:
        stated["size"] = _own_size(inputs, stated.get("layout", "nchw"))
    return _of_options(stated)


def _of_options(stated: dict[str, Any]) -> Preprocessing:
    from amct_pytorch.cli.images import Preprocessing

    with ExitStack() as names:
        for key in stated:
            names.enter_context(named_as(key, f"--{key}"))
        return Preprocessing(**stated)


@contextmanager
def named_as(name: str, option: str) -> Iterator[None]:
    """Errors that begin with the `name` of an argument or file begin with `option` instead."""
    from amct_pytorch.errors import AmctError

    try:
        yield
    except AmctError as error:
        text = str(error)
        if not text.startswith((f"{name} ", f"{name}:", f"{name}.")):
            raise
        raise type(error)(option + text.removeprefix(name)) from error


def _own_size(inputs: list[InputSpec], layout: str) -> tuple[int, int]:
    from amct_pytorch.errors import ArgumentValueError

    shape = inputs[0].shape
    if shape is not None and len(shape) == 4:
        height, width = shape[2:] if layout == "nchw" else shape[1:3]
        if isinstance(height, int) and isinstance(width, int):
            return height, width
    raise ArgumentValueError(
        "--size is missing: the model does not say how large its images are; give --size H,W"
    )


def _floats(text: str, what: str) -> tuple[float, ...]:
    from amct_pytorch.errors import ArgumentValueError

    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = (math.nan,)
    if not all(map(math.isfinite, found)):
        raise ArgumentValueError(f"{what} is {text!r}; allowed: numbers separated by commas")
    return found


def opened(data: dict[str, Any], inputs: list[InputSpec]) -> tuple[Data, Preprocessing | None]:
    """The data that the options name, for a model with these inputs.

    Raises:
        AmctError: naming the option, folder or file.
    """
    from amct_pytorch.auto_calibration.model_evaluator import parse_dtypes, parse_shapes
    from amct_pytorch.cli.data import Data, DataOptions
    from amct_pytorch.logs import logger

    stated = preprocessing_of(data, inputs)
    shapes = dict(parse_shapes(data["bin_shapes"], "--shape")) if data["bin_shapes"] else {}
    names = [spec.name for spec in inputs]
    if len(names) == 1 and len(shapes) == 1:
        shapes = {names[0]: next(iter(shapes.values()))}
    dtypes: dict[str, str] = {}
    if data["bin_dtypes"]:
        found = parse_dtypes(data["bin_dtypes"], "--dtype")
        dtypes = {"": found[0]} if len(found) == 1 else dict(zip(names, found, strict=False))
    options = DataOptions(tuple(data["sources"]), stated, shapes, dtypes, data["batch_size"])
    samples = Data(inputs, options)
    _check_images(data, samples)
    if stated is not None and stated.doubt is not None:
        logger.warning("%s", stated.doubt)
    return samples, stated


def _check_images(data: dict[str, Any], found: Data) -> None:
    """Options that would be without effect are refused, before anyone relies on them."""
    from amct_pytorch.errors import ArgumentValueError

    idle = [option for name, option in _OF_IMAGES.items() if data[name] is not None]
    if idle and not found.has_images:
        raise ArgumentValueError(
            f"{', '.join(idle)}: only for images, and --data has {found.kind} files, whose numbers "
            "are taken as they are; store them preprocessed, without these options"
        )
