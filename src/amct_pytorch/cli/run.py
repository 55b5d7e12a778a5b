"""`amct run`: a model on the user's data."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import click

from amct_pytorch.cli.command import Output, subcommand, table
from amct_pytorch.cli.data_options import data_options

MOST_SHOWN = 40


@subcommand("run")
@click.argument("model", metavar="MODEL")
@data_options
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for one .npy file an output [default: NAME_outputs].",
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
def command(
    output: Output, model: str, data: dict[str, Any], out: Path | None, threads: int
) -> None:
    """Run MODEL on data and write each of its outputs as .npy, all samples in order.

    MODEL is an ONNX file of any kind. A deploy model runs on the toolkit's own exact integers; all
    others in ONNX Runtime, with kernels that do not clip.
    """
    import numpy as np
    from tqdm import tqdm

    from amct_pytorch.cli.data_options import opened
    from amct_pytorch.cli.models import runner
    from amct_pytorch.errors import CalibrationError
    from amct_pytorch.files import WholeFiles
    from amct_pytorch.logs import start_logging

    start_logging(to_file=False)
    ready = runner(model, "MODEL", threads)
    found, preprocessing = opened(data, ready.inputs)
    output.note(f"model: {model} ({ready.kind}, runs in {ready.runtime})")
    output.note(f"data: {found}")
    for text in found.notes:
        output.note(f"data: {text}")
    if preprocessing is not None:
        output.note(f"images: {preprocessing}")
    names = [spec.name for spec in ready.inputs]
    parts: list[list[Any]] = []
    for batch in tqdm(found, "running", len(found), unit="batch", disable=None, leave=False):
        parts.append(ready.run(None, dict(zip(names, batch, strict=True))))
    folder = out or Path(f"{Path(model.replace(':', '_')).stem}_outputs")
    arrays = {}
    for name, column in zip(ready.output_names, zip(*parts, strict=True), strict=True):
        try:
            arrays[name] = np.concatenate(column) if np.ndim(column[0]) else np.array(column)
        except ValueError as error:
            raise CalibrationError(
                f"output {name!r} has another shape from batch to batch ({error}); use "
                "--batch-size 1 on data of one shape"
            ) from error
    files = {name: folder / f"{_file_name(name)}.npy" for name in arrays}
    with WholeFiles() as whole:
        for name, array in arrays.items():
            whole.write(files[name], functools.partial(_save, array), what="--out")
    output.document = {
        "model": model,
        "kind": ready.kind,
        "samples": found.samples,
        "outputs": {
            name: {"file": str(files[name]), "shape": list(a.shape), "dtype": str(a.dtype)}
            for name, a in arrays.items()
        },
        "best_class": _best(found, arrays),
    }
    if output.as_json:
        return
    _tell(output, output.document["best_class"])
    for name, array in arrays.items():
        output.say(f"{files[name]}  {name} {array.dtype} {list(array.shape)}")


def _file_name(output: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in output).strip(".") or "output"


def _save(array: Any, path: Path) -> None:
    import numpy as np

    with path.open("wb") as file:
        np.save(file, array)


def _best(found: Any, arrays: dict[str, Any]) -> dict[str, int] | None:
    """The best class of each image, where the model has one output that is a matrix."""
    first = next(iter(arrays.values()))
    files = found.files
    if len(arrays) != 1 or first.ndim != 2 or first.shape[1] < 2 or len(files) != len(first):
        return None
    return {file.name: int(best) for file, best in zip(files, first.argmax(1), strict=True)}


def _tell(output: Output, best: dict[str, int] | None) -> None:
    if not best:
        return
    rows = [(name, str(number)) for name, number in list(best.items())[:MOST_SHOWN]]
    output.say(table(("file", "best class"), rows, right="1"))
    if len(best) > MOST_SHOWN:
        output.say(f"and {len(best) - MOST_SHOWN} more")
    output.say()
