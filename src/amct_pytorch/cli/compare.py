"""`amct compare`: a quantized model beside its float model."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import click

from amct_pytorch.cli.command import GoalMissed, Output, bytes_text, subcommand, table
from amct_pytorch.cli.data_options import data_options
from amct_pytorch.cli.goal_options import goal_options

if TYPE_CHECKING:
    from amct_pytorch.cli.data import Data
    from amct_pytorch.cli.models import Runner


@subcommand("compare")
@click.argument("float_", metavar="FLOAT")
@click.argument("quantized", metavar="QUANT")
@data_options
@click.option(
    "--rounds",
    type=click.IntRange(0),
    default=20,
    show_default=True,
    help="Timed calls of each model, taking turns, on one sample; 0: none.",
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@goal_options
def command(
    output: Output,
    float_: str,
    quantized: str,
    data: dict[str, Any],
    rounds: int,
    threads: int,
    min_sqnr: float | None,
    min_cosine: float | None,
    min_top1: float | None,
) -> None:
    """Run FLOAT and QUANT on the same data and say how far their outputs are apart.

    Both are ONNX files of any kind (float, deploy, fake-quant, QDQ) or 'module:factory'. Deploy
    models run on the toolkit's own exact integers, all others in ONNX Runtime, with kernels that do
    not clip. Use data that calibration did not see.
    """
    from tqdm import tqdm

    from amct_pytorch.cli.data_options import opened
    from amct_pytorch.cli.measure import Goals, OutputAgreement
    from amct_pytorch.cli.models import check_same_inputs, runner

    reference = runner(float_, "FLOAT", threads)
    other = runner(quantized, "QUANT", threads)
    check_same_inputs(reference, other)
    given = reference if reference.kind != "torch" else other
    found, preprocessing = opened(data, given.inputs)
    output.note(f"data: {found}")
    if preprocessing is not None:
        output.note(f"images: {preprocessing}")
    outputs: list[OutputAgreement] = []
    for batch in tqdm(found, "comparing", len(found), leave=False, unit="batch", disable=None):
        meant = reference.run(None, _feeds(reference, batch))
        got = other.run(None, _feeds(other, batch))
        if not outputs:
            _check_outputs(reference, other, meant, got)
            outputs = [OutputAgreement(name) for name in reference.output_names]
        for one, a, b in zip(outputs, meant, got, strict=True):
            one.add(a, b)
    times = _latency(reference, other, found, rounds)
    goals = Goals(min_sqnr, min_cosine, min_top1)
    missed = [
        text
        for one in outputs
        for text in goals.missed(
            one.as_dict()["sqnr_db"], one.cosine, one.top1_agreement, f"output {one.name!r}"
        )
    ]
    output.document = {
        "samples": found.samples,
        "outputs": [one.as_dict() for one in outputs],
        "models": {
            "float": _about(reference, float_, times.get("float")),
            "quant": _about(other, quantized, times.get("quant")),
        },
        "speed_up": times.get("speed_up"),
        "goals_missed": missed,
    }
    _tell(output, outputs)
    if missed:
        raise GoalMissed("; ".join(missed))


def _feeds(model: Runner, batch: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip([spec.name for spec in model.inputs], batch, strict=True))


def _check_outputs(reference: Runner, other: Runner, meant: list[Any], got: list[Any]) -> None:
    from amct_pytorch.errors import ArgumentValueError

    if len(meant) != len(got):
        raise ArgumentValueError(
            f"FLOAT has {len(meant)} outputs ({', '.join(reference.output_names)}), QUANT "
            f"{len(got)} ({', '.join(other.output_names)})"
        )


def _latency(reference: Runner, other: Runner, data: Data, rounds: int) -> dict[str, float]:
    """Median milliseconds of each, and the median ratio of two calls that follow each other."""
    if not rounds:
        return {}
    from amct_pytorch.export.runtime import interleaved_latency

    batch = data.batch(0)
    one = batch if data.fixed else tuple(array[:1] for array in batch)
    models: dict[str, Any] = {"float": reference, "quant": other}
    feeds = {name: _feeds(model, one) for name, model in models.items()}
    times = interleaved_latency(models, feeds, rounds, warm_up=3)
    found = {name: statistics.median(values) for name, values in times.items()}
    ratios = [a / b for a, b in zip(times["float"], times["quant"], strict=True)]
    return {**found, "speed_up": statistics.median(ratios)}


def _about(model: Runner, name: str, milliseconds: float | None) -> dict[str, Any]:
    return {
        "model": name,
        "kind": model.kind,
        "runs_in": model.runtime,
        "bytes": model.bytes,
        "milliseconds": milliseconds,
    }


def _tell(output: Output, outputs: list[Any]) -> None:
    if output.as_json:
        return
    rows = []
    for one in outputs:
        top1 = "" if one.top1_agreement is None else f"{one.top1_agreement:.2%}"
        sqnr = "exact" if one.as_dict()["exact"] else f"{one.sqnr_db:.2f}"
        rows.append((one.name, sqnr, f"{one.cosine:.5f}", top1, f"{one.largest:.4g}"))
    header = ("output", "SQNR dB", "cosine", "top-1 agreement", "largest difference")
    output.say(table(header, rows, right="1234"))
    output.say()
    models = output.document["models"].values()
    rows = [
        (
            about["model"],
            about["kind"],
            about["runs_in"],
            bytes_text(about["bytes"]),
            "" if about["milliseconds"] is None else f"{about['milliseconds']:.2f}",
        )
        for about in models
    ]
    output.say(table(("model", "kind", "runs in", "size", "ms"), rows, right="34"))
    first, second = (about["bytes"] for about in models)
    text = f"size: {second / first:.2f} of float" if first else ""
    if output.document["speed_up"] is not None:
        text += f"; speed: {output.document['speed_up']:.2f} times float (median, taking turns)"
    output.say(text)
