"""`amct compare`: a quantized model beside its float model."""

from __future__ import annotations

from typing import Any

import click

from amct_pytorch.cli.command import GoalMissed, Output, bytes_text, subcommand, table
from amct_pytorch.cli.data_options import data_options
from amct_pytorch.cli.goal_options import goal_options


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
    from amct_pytorch.cli.comparing import compared
    from amct_pytorch.cli.data_options import opened
    from amct_pytorch.cli.measure import Goals
    from amct_pytorch.cli.models import check_same_inputs, runner
    from amct_pytorch.logs import start_logging

    start_logging(to_file=False)
    reference = runner(float_, "FLOAT", threads)
    other = runner(quantized, "QUANT", threads)
    check_same_inputs(reference, other)
    given = reference if reference.kind != "torch" else other
    found, preprocessing = opened(data, given.inputs)
    output.note(f"data: {found}")
    if preprocessing is not None:
        output.note(f"images: {preprocessing}")
    outputs, about = compared(reference, other, found, rounds)
    goals = Goals(min_sqnr, min_cosine, min_top1)
    missed = [
        text
        for one in outputs
        for text in goals.missed(
            one.as_dict()["sqnr_db"], one.cosine, one.top1_agreement, f"output {one.name!r}"
        )
    ]
    about["models"]["float"]["model"], about["models"]["quant"]["model"] = float_, quantized
    if other.kind == "float" and reference.kind in ("deploy", "fake-quant", "QDQ"):
        output.note(f"FLOAT is a {reference.kind} model and QUANT a float one: are they swapped?")
    output.document = {**about, "goals_missed": missed}
    _tell(output, outputs)
    if missed:
        raise GoalMissed("; ".join(missed))


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
