"""Post-training quantization: create_quant_config, quantize_model, save_model."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import nn

from amct_pytorch.config.calibration_cfg import calibration_config_from_cfg
from amct_pytorch.config.calibration_json import dump_calibration_json
from amct_pytorch.config.cfg_file import parse_calibration_cfg
from amct_pytorch.config.defaults import default_calibration_config
from amct_pytorch.errors import ExportError, ModelError, RecordError
from amct_pytorch.files import PathLike, WholeFiles, check_distinct, check_writable, write_whole
from amct_pytorch.flows.arguments import public_call
from amct_pytorch.flows.calibration import CalibrationResult
from amct_pytorch.flows.outputs import output_path
from amct_pytorch.flows.preparation import (
    FINGERPRINT_KEY,
    LEDGER_KEY,
    InputData,
    Prepared,
    nothing_to_quantize,
    prepare,
    warn_if_poor,
)
from amct_pytorch.graph.look import look_at
from amct_pytorch.graph.tensors import ModelInputs
from amct_pytorch.logs import logger, start_logging
from amct_pytorch.memory import release_memory
from amct_pytorch.record.fingerprint import fingerprint
from amct_pytorch.record.record_file import RecordFile, read_record
from amct_pytorch.report.ledger import Ledger
from amct_pytorch.report.table import ledger_table

if TYPE_CHECKING:
    import onnx

    from amct_pytorch.export.float_model import DynamicAxes


@public_call
def create_quant_config(
    config_file: PathLike,
    model: nn.Module,
    input_data: InputData,
    skip_layers: Iterable[str] | None = None,
    batch_num: int = 1,
    activation_offset: bool = True,
    config_defination: PathLike | None = None,
) -> None:
    """Finds every quantizable layer and writes the calibration config as JSON.

    The model is run once on `input_data` to see which layers there are. Layers that cannot be
    quantized (reused, tied, never run, …) are left out with a log line that says why.

    Args:
        config_file: JSON file to write.
        model: with its weights, on any device; left untouched.
        input_data: a tuple of tensors for its forward, a bare tensor, a list, or a dict of
            keyword inputs.
        skip_layers: names of layers to leave in float.
        batch_num: forward passes that calibration will observe, >= 1.
        activation_offset: whether layer inputs get a zero point (asymmetric).
        config_defination: protobuf-text ``.cfg`` (message AMCTConfig). With it, the other
            optional arguments are ignored. Also accepted as `config_definition`.

    Raises:
        AmctError: naming the argument, file or layer, what was found and what is allowed.
    """
    start_logging(to_file=False)
    inputs = ModelInputs.of(input_data)
    check_writable(config_file, "config_file")
    if config_defination is not None:
        check_distinct(config_defination=config_defination, config_file=config_file)
    message = None if config_defination is None else parse_calibration_cfg(config_defination)
    graph = look_at(model, inputs)
    start_logging(to_file=True)
    if model.training:
        logger.warning(
            "the model is in training mode; a copy of it is seen, calibrated and saved in eval mode"
        )
    if message is None:
        config = default_calibration_config(
            graph.layers,
            batch_num=batch_num,
            activation_offset=activation_offset,
            skip_layers=skip_layers,
        )
    else:
        config = calibration_config_from_cfg(
            message, graph.layers, graph.module_names, str(config_defination)
        )
    if not config.layers:
        raise ModelError(nothing_to_quantize(graph))
    write_whole(config_file, dump_calibration_json(config).encode(), what="config_file")


@public_call
def quantize_model(
    config_file: PathLike,
    modfied_onnx_file: PathLike,
    record_file: PathLike,
    model: nn.Module,
    input_data: InputData,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_axes: DynamicAxes | None = None,
) -> nn.Module:
    """Prepares a copy of the model for calibration.

    Conv+BN is fused, the fused float model written to `modfied_onnx_file` and `record_file`
    begun. Run `batch_num` forward passes on the returned module: it returns the float output
    until the last of them has run; then ranges are searched, biases corrected, both files
    completed, and it returns the simulated quantized output. Further passes change no file.

    Args:
        config_file: JSON written by `create_quant_config`.
        modfied_onnx_file: ONNX file to write. Also accepted as `modified_onnx_file` and
            `modified_onnx_model`.
        record_file: record file to write.
        model: as given to `create_quant_config`; left untouched. Layers may be float32, float16
            or bfloat16; the ONNX model has bfloat16 ones, and inputs and outputs of that type,
            in float32.
        input_data: example inputs, as there.
        input_names: names of the ONNX model's inputs.
        output_names: names of its outputs.
        dynamic_axes: ``{name: {axis: label}}`` or ``{name: [axes]}``.

    Returns:
        The calibration model, in eval mode, on the model's device.

    Raises:
        AmctError: naming the argument, file or layer, what was found and what is allowed;
            nothing is written then.
    """

    def finished(prepared: Prepared, result: CalibrationResult) -> None:
        warn_if_poor(prepared.complete(result))

    names = (input_names, output_names, dynamic_axes)
    return prepare(
        config_file, modfied_onnx_file, record_file, model, input_data, names, finished
    ).model


@public_call
def save_model(modfied_onnx_file: PathLike, record_file: PathLike, save_path: PathLike) -> None:
    """Writes the fake-quant and the deploy model from the two files of `quantize_model`.

    Also writes ``<save_path>_ledger.json`` and prints the ledger as a table.

    Args:
        modfied_onnx_file: ONNX file that calibration completed. Also accepted as
            `modified_onnx_file` and `modified_onnx_model`.
        record_file: record file that calibration completed.
        save_path: folder and prefix: ``<save_path>_fake_quant_model.onnx`` and
            ``<save_path>_deploy_model.onnx`` are written; with an empty prefix (a path that
            ends with a separator), the names begin at ``fake_quant_model.onnx``.

    Raises:
        AmctError: naming the file or layer; nothing is written then.
    """
    from amct_pytorch.export.deploy import build_deploy
    from amct_pytorch.export.fake_quant import build_fake_quant
    from amct_pytorch.export.integer_layer import inexact_in_float32
    from amct_pytorch.export.onnx_file import load_onnx, save_onnx, size_on_disk

    start_logging(to_file=False)
    started = time.perf_counter()
    targets = {name: output_path(save_path, name) for name in ("fake_quant", "deploy", "ledger")}
    for path in targets.values():
        check_writable(path, "save_path")
        check_distinct(modfied_onnx_file=modfied_onnx_file, record_file=record_file, save_path=path)
    float_model = load_onnx(modfied_onnx_file, "modfied_onnx_file", tensors_stay=True)
    record = read_record(record_file)
    factors = record.factors
    inexact = inexact_in_float32(float_model, factors)
    ledger = _stored_ledger(float_model, record)
    for entry in ledger.layers:
        if entry.name in inexact:
            entry.notes.append(
                "its sums can exceed 2^24, where the fake-quant model's float32 is not exact"
            )
    release_memory()
    start_logging(to_file=True)
    with WholeFiles() as files:
        # One model after the other: each is gone from memory before the next is built.
        ledger.bytes = {
            "float": size_on_disk(modfied_onnx_file),
            "fake-quant": save_onnx(
                build_fake_quant(float_model, factors),
                targets["fake_quant"],
                what="save_path",
                external_suffix="_fakequant.external",
                files=files,
            ),
            "deploy": save_onnx(
                build_deploy(float_model, factors),
                targets["deploy"],
                what="save_path",
                external_suffix="_deploy.external",
                files=files,
            ),
        }
        ledger.seconds["save"] = time.perf_counter() - started
        files.write(targets["ledger"], ledger.to_json(indent=4).encode(), what="save_path")
    print(ledger_table(ledger))
    warn_if_poor(ledger)


def _stored_ledger(model: onnx.ModelProto, record: RecordFile) -> Ledger:
    """The ledger that calibration left in the modified ONNX, with factors for all its layers."""
    factors = record.factors
    stored = {entry.key: entry.value for entry in model.metadata_props}
    if LEDGER_KEY not in stored:
        raise RecordError(
            "the modified ONNX model has not been completed by calibration: run batch_num "
            "forward passes of the module that quantize_model returned first"
        )
    try:
        ledger = Ledger.from_json(stored[LEDGER_KEY])
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ExportError(
            f"the modified ONNX model's metadata {LEDGER_KEY} is damaged ({reason}); run "
            "quantize_model and the calibration again"
        ) from error
    quantized = [entry.name for entry in ledger.layers if entry.status == "quantized"]
    missing = [name for name in quantized if name not in factors or not factors[name].complete]
    if missing:
        raise RecordError(
            f"{record.source}: factors are missing for {', '.join(map(repr, missing))}, which "
            "the ONNX model was calibrated with; restore the record, or calibrate again"
        )
    if stored.get(FINGERPRINT_KEY) != fingerprint(factors):
        note = (
            "the record's factors are not those the ONNX model was calibrated with (edited, or "
            "from another run): errors in this ledger are of the calibration's own factors"
        )
        logger.warning(note)
        ledger.notes.append(note)
    return ledger
