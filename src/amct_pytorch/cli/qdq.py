"""`amct qdq`: a deploy model as portable ONNX."""

from __future__ import annotations

from pathlib import Path

import click

from amct_pytorch.cli.command import Output, bytes_text, subcommand

DEPLOY = "deploy_model"


def qdq_path(deploy: Path) -> Path:
    """Where the QDQ model of a deploy model goes: ``net_qdq_model.onnx`` beside it."""
    stem = deploy.stem
    name = stem.removesuffix(DEPLOY) + "qdq_model" if stem.endswith(DEPLOY) else f"{stem}_qdq_model"
    return deploy.with_name(f"{name}.onnx")


@subcommand("qdq")
@click.argument("deploy", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="File to write [default: beside it].")
def command(output: Output, deploy: Path, out: Path | None) -> None:
    """Turn the deploy model DEPLOY (ONNX with AscendQuant/AscendDequant) into standard ONNX.

    The result has QuantizeLinear and DequantizeLinear; ONNX Runtime, TensorRT and OpenVINO run
    it. `amct doctor` says whether ONNX Runtime's fast int8 kernels are exact on this machine.
    """
    from amct_pytorch.cli.wrong_kind import ONNX_KINDS, kind_told
    from amct_pytorch.export.onnx_file import size_on_disk
    from amct_pytorch.export.qdq import deploy_to_qdq
    from amct_pytorch.logs import start_logging

    start_logging(to_file=False)
    target = out or qdq_path(deploy)
    with kind_told(deploy, "DEPLOY", "a deploy model", ONNX_KINDS):
        deploy_to_qdq(deploy, target)
    size = size_on_disk(target)
    output.document = {"file": str(target), "bytes": size}
    output.say(f"{target} ({bytes_text(size)})")
