"""`convert_qat_model`: from a QDQ model with trained factors to the files that are deployed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from torch import nn

from amct_pytorch.errors import ArgumentTypeError
from amct_pytorch.files import PathLike, WholeFiles, check_distinct, check_writable
from amct_pytorch.flows.arguments import public_call
from amct_pytorch.flows.outputs import output_path
from amct_pytorch.logs import start_logging
from amct_pytorch.record.record_file import RecordFile, write_record
from amct_pytorch.report.ledger import LayerEntry, Ledger
from amct_pytorch.report.table import ledger_table

if TYPE_CHECKING:
    from amct_pytorch.export.qat_model import QatModel


@public_call
def convert_qat_model(
    model_file: PathLike, save_path: PathLike, record_file: PathLike | None = None
) -> None:
    """Writes the fake-quant and the deploy model of a QDQ model with trained factors.

    A Conv, ConvTranspose, Gemm or MatMul is quantized whose input comes from QuantizeLinear and
    DequantizeLinear, and whose weight from a DequantizeLinear; the factors are those of the
    file. Other layers stay float, with the reason in ``<save_path>_ledger.json``.

    Args:
        model_file: what ``torch.onnx.export(model, …, dynamo=True)`` wrote of a model with
            quantization-aware operators (`Conv2dQAT` and the like).
        save_path: folder and prefix: ``<save_path>_fake_quant_model.onnx`` and
            ``<save_path>_deploy_model.onnx`` are written, as by `save_model`.
        record_file: record to write the factors to as well; None: none.

    Raises:
        ArgumentTypeError, ArgumentValueError: an argument is no path of a file, or two are one.
        FileMissingError: `model_file` does not exist.
        FileAccessError: a file cannot be read or written.
        ExportError: `model_file` is no such model; nothing is written then.
    """
    from amct_pytorch.export.deploy import build_deploy
    from amct_pytorch.export.fake_quant import build_fake_quant
    from amct_pytorch.export.integer_layer import inexact_in_float32
    from amct_pytorch.export.onnx_file import load_onnx, save_onnx, size_on_disk
    from amct_pytorch.export.qat_model import read_qat_model

    start_logging(to_file=False)
    started = time.perf_counter()
    if isinstance(model_file, nn.Module):
        raise ArgumentTypeError(
            f"model_file is a {type(model_file).__name__}, a module; allowed is a file: write it "
            "first, with torch.onnx.export(model, (example,), 'net.onnx', dynamo=True), and give "
            "'net.onnx'"
        )
    targets = {name: output_path(save_path, name) for name in ("fake_quant", "deploy", "ledger")}
    for path in targets.values():
        check_writable(path, "save_path")
        check_distinct(model_file=model_file, save_path=path)
    record_path = None
    if record_file is not None:
        record_path = check_writable(record_file, "record_file")
        for path in targets.values():
            check_distinct(record_file=record_file, save_path=path)
        check_distinct(model_file=model_file, record_file=record_file)
    found = read_qat_model(load_onnx(model_file, "model_file"))
    for name in inexact_in_float32(found.model, found.factors):
        found.notes.setdefault(name, []).append(
            "its sums can exceed 2^24, where the fake-quant model's float32 is not exact"
        )
    ledger = Ledger("convert_qat_model", _entries(found))
    fake_quant = build_fake_quant(found.model, found.factors)
    deploy = build_deploy(found.model, found.factors)
    start_logging(to_file=True)
    with WholeFiles() as files:
        ledger.bytes = {
            "trained": size_on_disk(model_file),
            "fake-quant": save_onnx(
                fake_quant,
                targets["fake_quant"],
                what="save_path",
                external_suffix="_fakequant.external",
                files=files,
            ),
            "deploy": save_onnx(
                deploy,
                targets["deploy"],
                what="save_path",
                external_suffix="_deploy.external",
                files=files,
            ),
        }
        ledger.seconds["convert"] = round(time.perf_counter() - started, 4)
        files.write(targets["ledger"], ledger.to_json(indent=4).encode(), what="save_path")
        if record_path is not None:
            record = RecordFile(factors=found.factors)
            write_record(record_path, record, announce=False, files=files)
    print(ledger_table(ledger))


def _entries(found: QatModel) -> list[LayerEntry]:
    entries = []
    for name, kind in found.types.items():
        entry = LayerEntry(name, kind, "float", found.reasons.get(name), found.parameters[name])
        factors = found.factors.get(name)
        if factors is not None:
            entry.status = "quantized"
            entry.input_scale, entry.input_offset = factors.scale_d, factors.offset_d
            entry.weight_bits = factors.weight_bits
            entry.weight_scales = len(factors.scale_w)
            entry.weight_scale_range = min(factors.scale_w), max(factors.scale_w)
            entry.notes = found.notes.get(name, [])
        entries.append(entry)
    return entries
