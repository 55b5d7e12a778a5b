"""Users' data as batches: images, .npy, .npz and raw .bin files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from amct_pytorch.cli import images
from amct_pytorch.cli.images import Preprocessing
from amct_pytorch.errors import (
    ArgumentValueError,
    CalibrationError,
    FileMissingError,
    did_you_mean,
)
from amct_pytorch.logs import logger

SUFFIXES = (".bin", ".npy", ".npz", *images.SUFFIXES)
# Used where neither the model nor the user says more.
BATCH_SIZE = 8


@dataclass(frozen=True)
class InputSpec:
    """One input of a model.

    Attributes:
        name: of it.
        shape: a number for a fixed axis, anything else for a free one; None: not known.
        dtype: NumPy's name; None: not known.
    """

    name: str
    shape: tuple[int | str | None, ...] | None = None
    dtype: str | None = None

    @property
    def rank(self) -> int | None:
        """Number of axes, None where it is not known."""
        return None if self.shape is None else len(self.shape)

    @property
    def batch(self) -> int | None:
        """The size of the first axis where it is fixed."""
        return self.shape[0] if self.shape and isinstance(self.shape[0], int) else None


@dataclass(frozen=True)
class DataOptions:
    """What the user said of the data.

    Attributes:
        sources: of ``--data``: a folder or file, or ``name=folder`` for one input of several.
        preprocessing: for images.
        shapes: of one batch in a .bin file, by input.
        dtypes: of the elements in .bin files, by input ("" for all).
        batch_size: samples of a batch; None: the model's own, or 8.
    """

    sources: tuple[str, ...]
    preprocessing: Preprocessing | None = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    batch_size: int | None = None


class Data:
    """Samples of all inputs of a model, in batches.

    Attributes:
        samples: how many.
        batch_size: samples of a batch; the last may have fewer where the model takes that.
        kind: of the files: images, npy, npz or bin.
        notes: what was left out.
    """

    def __init__(self, inputs: Sequence[InputSpec], options: DataOptions) -> None:
        """Finds the files; contents are read batch by batch.

        Raises:
            FileMissingError, ArgumentValueError, CalibrationError: naming the source or file.
        """
        self.notes: list[str] = []
        sources = _by_input(inputs, options.sources)
        self._columns = [_Column(spec, _files(sources[spec.name]), options) for spec in inputs]
        self.kind = self._columns[0].kind
        counts = {column.spec.name: len(column) for column in self._columns}
        self.samples = min(counts.values())
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{name} {number}" for name, number in counts.items())
            raise ArgumentValueError(
                f"--data: the inputs have different numbers of samples: {told}"
            )
        fixed = {spec.batch for spec in inputs} - {None}
        if len(fixed) == 1 and options.batch_size not in (None, *fixed):
            raise ArgumentValueError(
                f"--batch-size is {options.batch_size}; the model's batch axis is fixed to "
                f"{fixed.pop()}"
            )
        self.fixed = bool(fixed)
        own = next(iter(fixed), None) or options.batch_size or BATCH_SIZE
        self.batch_size = min(own, self.samples) if not fixed else own
        if self.fixed and self.samples < own:
            raise CalibrationError(
                f"--data has {self.samples} samples; the model takes {own} at once"
            )
        rest = self.samples % self.batch_size
        if self.fixed and rest:
            self.notes.append(
                f"the last {rest} samples are left out: the model takes {own} at once"
            )

    @property
    def has_images(self) -> bool:
        """Whether an input's samples are images."""
        return any(column.kind == "image" for column in self._columns)

    @property
    def files(self) -> list[Path]:
        """The files of the first input."""
        return self._columns[0].files

    def __len__(self) -> int:
        whole, rest = divmod(self.samples, self.batch_size)
        return whole + bool(rest and not self.fixed)

    def batch(self, index: int) -> tuple[np.ndarray, ...]:
        """One batch of all inputs."""
        start = index * self.batch_size
        stop = min(start + self.batch_size, self.samples)
        return tuple(column.rows(start, stop) for column in self._columns)

    def __iter__(self) -> Iterator[tuple[np.ndarray, ...]]:
        return (self.batch(index) for index in range(len(self)))

    def __str__(self) -> str:
        files = sum(len(column.files) for column in self._columns)
        return (
            f"{self.samples} samples from {files} {self.kind} file{'s' * (files != 1)}, "
            f"batches of {self.batch_size}"
        )


def _by_input(inputs: Sequence[InputSpec], sources: Sequence[str]) -> dict[str, Path]:
    """The folder or file of each input."""
    names = [spec.name for spec in inputs]
    found: dict[str, Path] = {}
    plain: list[str] = []
    for source in sources:
        name, equals, path = source.partition("=")
        if equals and (name in names or not Path(source).exists()):
            if name not in names:
                raise ArgumentValueError(
                    f"--data names the input {name!r}{did_you_mean(name, names)}; the model has "
                    f"{', '.join(names)}"
                )
            if name in found:
                raise ArgumentValueError(f"--data names the input {name!r} twice")
            found[name] = Path(path)
        else:
            plain.append(source)
    if not found and len(plain) == 1:
        only = Path(plain[0])
        if len(names) > 1 and all((only / name).is_dir() for name in names):
            return {name: only / name for name in names}
        if len(names) == 1 or _has_npz(only):
            return dict.fromkeys(names, only)
    if not found and len(plain) == len(names):
        return dict(zip(names, map(Path, plain), strict=True))
    missing = [name for name in names if name not in found]
    if missing or plain:
        raise ArgumentValueError(
            f"--data gives {', '.join(map(repr, sources))}; the model has the inputs "
            f"{', '.join(names)}: give --data NAME=FOLDER for each, one folder with a subfolder "
            "named after each, or .npz files that hold all"
        )
    return found


def _has_npz(path: Path) -> bool:
    if path.is_dir():
        return any(file.suffix.lower() == ".npz" for file in path.iterdir())
    return path.suffix.lower() == ".npz"


def _files(path: Path) -> list[Path]:
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    else:
        raise FileMissingError(f"--data: there is no folder or file {str(path)!r}")
    known = [file for file in files if file.suffix.lower() in SUFFIXES and file.is_file()]
    if not known:
        found = Counter(file.suffix or "no suffix" for file in files)
        told = ", ".join(f"{number} {suffix}" for suffix, number in found.items()) or "nothing"
        raise FileMissingError(
            f"--data: {str(path)!r} has no data that can be read (it has {told}); allowed: "
            f"{', '.join(SUFFIXES)}"
        )
    kinds = {_kind(file) for file in known}
    if len(kinds) > 1:
        raise ArgumentValueError(
            f"--data: {str(path)!r} has files of different kinds: {', '.join(sorted(kinds))}; "
            "put each into a folder of its own"
        )
    return known


def _kind(file: Path) -> str:
    suffix = file.suffix.lower()
    return "image" if suffix in images.SUFFIXES else suffix[1:]


class _Column:
    """The samples of one input, in the order of its files' names."""

    def __init__(self, spec: InputSpec, files: list[Path], options: DataOptions) -> None:
        self.spec = spec
        self.files = files
        self.kind = _kind(files[0])
        self._options = options
        self._dtype = options.dtypes.get(spec.name) or options.dtypes.get("") or spec.dtype
        if self.kind == "image" and options.preprocessing is None:
            raise ArgumentValueError(
                "--data has images, and how they are preprocessed is not known: give --mean and "
                "--std as in training (of pixel values from 0 to 255; say --mean 127.5 --std "
                "127.5), or --preprocessing with a file that amct wrote"
            )
        counts = [self._count(file) for file in files]
        self._starts = np.cumsum([0, *counts])
        self._open: tuple[int, np.ndarray] | None = None
        self._told_of_integers = self.kind == "bin"  # whose type is stated

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, start: int, stop: int) -> np.ndarray:
        """The samples of these numbers, as one array."""
        rows = []
        for index in range(start, stop):
            number = int(np.searchsorted(self._starts, index, side="right")) - 1
            rows.append(self._contents(number)[index - int(self._starts[number])])
        first = rows[0].shape
        for row in rows:
            if row.shape != first:
                raise CalibrationError(
                    f"--data: input {self.spec.name!r} has samples of different shapes in one "
                    f"batch, {list(first)} and {list(row.shape)}; use --batch-size 1"
                )
        batch = np.stack(rows)
        self._check(batch)
        return batch

    def _check(self, batch: np.ndarray) -> None:
        wanted = self.spec.shape
        if wanted is None:
            return
        fits = len(wanted) == batch.ndim and all(
            not isinstance(size, int) or size == given
            for size, given in zip(wanted[1:], batch.shape[1:], strict=True)
        )
        if not fits:
            shown = [size if size else "?" for size in wanted]
            raise CalibrationError(
                f"--data: input {self.spec.name!r} gets batches of shape {list(batch.shape)}; the "
                f"model takes {shown}"
            )

    def _count(self, file: Path) -> int:
        if self.kind == "image":
            return 1
        if self.kind == "bin":
            return self._bin_shape(file)[0]
        array = self._array(file)
        if self._is_batch(array, file):
            return len(array)
        return 1

    def _contents(self, number: int) -> np.ndarray:
        """What a file holds, [samples, ...]."""
        if self._open is not None and self._open[0] == number:
            return self._open[1]
        file = self.files[number]
        if self.kind == "image":
            assert self._options.preprocessing is not None
            found = self._typed(self._options.preprocessing.sample(file)[None], file)
        elif self.kind == "bin":
            found = np.fromfile(file, np.dtype(self._dtype or "float32"))
            found = self._typed(found.reshape(self._bin_shape(file)), file)
        else:
            array = self._array(file)
            found = self._typed(array if self._is_batch(array, file) else array[None], file)
        self._open = (number, found)
        return found

    def _typed(self, array: np.ndarray, file: Path) -> np.ndarray:
        if self.spec.dtype is None or array.dtype == self.spec.dtype:
            return np.asarray(array)
        if not np.can_cast(array.dtype, self.spec.dtype, "same_kind"):
            raise CalibrationError(
                f"{str(file)!r} holds {array.dtype}; input {self.spec.name!r} of the model takes "
                f"{self.spec.dtype} (numbers are not converted from one kind to another: "
                "preprocess them first)"
            )
        if np.dtype(self.spec.dtype).kind == "f" and array.dtype.kind in "biu":
            self._tell_of_integers(array.dtype, file)
        return np.asarray(array).astype(self.spec.dtype)

    def _tell_of_integers(self, dtype: np.dtype, file: Path) -> None:
        """Pixels that nobody has preprocessed look like this."""
        if not self._told_of_integers:
            self._told_of_integers = True
            logger.warning(
                "--data: %r holds %s and input %r takes %s: the numbers are taken as they are, "
                "without any mean or std",
                str(file), dtype, self.spec.name, self.spec.dtype,
            )  # fmt: skip

    def _array(self, file: Path) -> np.ndarray:
        try:
            if self.kind == "npy":
                array: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
                return array
            with np.load(file, allow_pickle=False) as archive:
                names = list(archive)
                name = self.spec.name if self.spec.name in names else None
                if name is None and len(names) == 1:
                    name = names[0]
                if name is None:
                    hint = did_you_mean(self.spec.name, names)
                    raise ArgumentValueError(
                        f"{str(file)!r} has no array {self.spec.name!r}{hint}; it has "
                        f"{', '.join(names)}"
                    )
                return np.asarray(archive[name])
        except (OSError, ValueError, EOFError) as error:
            if isinstance(error, ArgumentValueError):
                raise
            raise CalibrationError(f"{str(file)!r} cannot be read: {error}") from error

    def _is_batch(self, array: np.ndarray, file: Path) -> bool:
        """Whether the array's first axis counts samples."""
        rank = self.spec.rank
        if rank is None or array.ndim == rank:
            if array.ndim == 0 or len(array) == 0:
                raise CalibrationError(f"{str(file)!r} holds no sample: shape {list(array.shape)}")
            return True
        if array.ndim == rank - 1:
            return False
        raise CalibrationError(
            f"{str(file)!r} has {array.ndim} axes {list(array.shape)}; input {self.spec.name!r} "
            f"takes {rank} (or {rank - 1}, for one sample a file)"
        )

    def _bin_shape(self, file: Path) -> tuple[int, ...]:
        """The shape of a raw file's contents."""
        item = np.dtype(self._dtype or "float32").itemsize
        size = file.stat().st_size
        given = self._options.shapes.get(self.spec.name)
        if given is not None:
            expected = int(np.prod(given, dtype=np.int64)) * item
            if size != expected:
                raise ArgumentValueError(
                    f"{file} has {size} bytes; input {self.spec.name!r} of shape "
                    f"{','.join(map(str, given))} and type {self._dtype or 'float32'} needs "
                    f"{expected}"
                )
            return given
        rest = self.spec.shape[1:] if self.spec.shape else None
        if rest is None or not all(isinstance(n, int) for n in rest):
            raise ArgumentValueError(
                f"--data has .bin files for input {self.spec.name!r}, whose shape is not known: "
                f"give --shape '{self.spec.name}:n,c,h,w'"
            )
        sample = int(np.prod([n for n in rest if isinstance(n, int)], dtype=np.int64)) * item
        if size == 0 or size % sample:
            raise ArgumentValueError(
                f"{file} has {size} bytes; a sample of input {self.spec.name!r} has {sample}"
            )
        return (size // sample, *(int(n) for n in rest if isinstance(n, int)))
