"""`amct quantize`: post-training quantization without writing Python."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from amct_pytorch.cli.command import GoalMissed, Output, bytes_text, subcommand
from amct_pytorch.cli.data_options import data_options
from amct_pytorch.cli.goal_options import goal_options

if TYPE_CHECKING:
    from amct_pytorch.cli.quantizing import Request

MOST_BATCHES = 16


@subcommand("quantize")
@click.argument("model", metavar="MODEL")
@data_options
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder and prefix of the files [default: NAME_int8/NAME].",
)
@click.option(
    "--batch-num",
    type=click.IntRange(1),
    help=f"Batches to calibrate on [default: all, at most {MOST_BATCHES}].",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="Config as JSON (used as it is) or .cfg (which layers, and how).",
)
@click.option("--skip", multiple=True, metavar="LAYER", help="Leave a layer in float; repeatable.")
@click.option(
    "--symmetric", is_flag=True, help="No offset for activations (activation_offset false)."
)
@click.option(
    "--accuracy",
    type=click.Choice(["plain", "best"]),
    default="plain",
    show_default=True,
    help="best: weights are rounded by what comes out of each layer (AdaRound); takes minutes.",
)
@click.option(
    "--qdq", is_flag=True, help="Write portable QuantizeLinear/DequantizeLinear ONNX too."
)
@click.option("--report", is_flag=True, help="Write an HTML report too.")
@goal_options
def command(output: Output, model: str, data: dict[str, Any], **given: Any) -> None:
    """Quantize MODEL to int8: calibrate it on data, write deploy and fake-quant ONNX.

    MODEL is an ONNX file with a float network, or 'module:factory', a Python function that returns
    a torch.nn.Module. The data should be like that which the network will see, preprocessed as in
    training; 16 to 64 varied samples do for most image networks.

    \b
    amct quantize net.onnx --data photos/ --mean 127 --std 128 --qdq --report
    amct quantize net.onnx --data input_ids=ids/ --data attention_mask=masks/
    amct quantize mynets:build --data samples.npy --out out/net --min-top1 0.98
    """
    request = _request(model, data, given)
    from amct_pytorch.cli.quantizing import quantize

    done = quantize(request, output.note)
    output.document = done.document
    if not output.as_json:
        from amct_pytorch.report.table import ledger_table

        output.say(ledger_table(done.ledger))
        output.say()
        for file in done.files:
            output.say(f"{file}  ({bytes_text(file.stat().st_size)})")
    if done.missed:
        raise GoalMissed("; ".join(done.missed))


def _request(model: str, data: dict[str, Any], given: dict[str, Any]) -> Request:
    from amct_pytorch.cli.measure import Goals
    from amct_pytorch.cli.quantizing import Request
    from amct_pytorch.errors import ArgumentValueError

    if given["config"] is not None:
        clashing = {
            "--skip": bool(given["skip"]),
            "--symmetric": given["symmetric"],
            "--accuracy best": given["accuracy"] == "best",
        }
        for option, used in clashing.items():
            if used:
                raise ArgumentValueError(f"{option} cannot go with --config, which says it itself")
    return Request(
        model=model,
        data=data,
        out=given["out"],
        batch_num=given["batch_num"],
        most_batches=MOST_BATCHES,
        config=given["config"],
        skip=tuple(given["skip"]),
        symmetric=given["symmetric"],
        best=given["accuracy"] == "best",
        qdq=given["qdq"],
        report=given["report"],
        goals=Goals(given["min_sqnr"], given["min_cosine"], given["min_top1"]),
    )
