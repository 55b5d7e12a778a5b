"""Block-wise distillation: config, student, distillation, saving."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from amct_pytorch.config.cfg_file import parse_distill_cfg
from amct_pytorch.config.distill import DistillConfig
from amct_pytorch.config.distill_cfg import distill_config_from_cfg
from amct_pytorch.config.distill_json import (
    default_distill_layers,
    distillable,
    load_distill_json,
)
from amct_pytorch.config.layered_json import dump_layered
from amct_pytorch.distillation.groups import found_groups, user_groups
from amct_pytorch.distillation.progress import identity
from amct_pytorch.distillation.samples import DistillSampleBase, model_inputs
from amct_pytorch.distillation.student import check_groups, create_student
from amct_pytorch.distillation.teach import Teaching, teach
from amct_pytorch.distillation.train_block import Loss, MakeOptimizer
from amct_pytorch.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    CalibrationError,
    ConfigError,
    ModelError,
    shown,
)
from amct_pytorch.files import PathLike, check_distinct, check_writable, write_whole
from amct_pytorch.flows.arguments import public_call
from amct_pytorch.flows.preparation import InputData
from amct_pytorch.flows.trained_files import save_trained
from amct_pytorch.graph.look import ModelGraph, look_at
from amct_pytorch.graph.tensors import ModelInputs
from amct_pytorch.logs import LOG_FILE, start_logging
from amct_pytorch.nn.retrain import retrain_layers
from amct_pytorch.record.record_file import RecordFile

if TYPE_CHECKING:
    from amct_pytorch.export.float_model import DynamicAxes

# Where the record goes that has no name, and finished blocks of an interrupted distillation.
RECORD = LOG_FILE.parent / "distill_record.txt"
PROGRESS = LOG_FILE.parent / "distill"


@public_call
def create_distill_config(
    config_file: PathLike,
    model: nn.Module,
    input_data: InputData,
    config_defination: PathLike | None = None,
) -> None:
    """Finds the layers and the blocks that can be distilled and writes the config as JSON.

    Layers are Conv2d, Conv3d, ConvTranspose2d and Linear. A unit is a layer with the BatchNorm
    and the activation behind it; where one unit reads nothing but what another makes, they form
    a cascade, which is cut into blocks of `group_size` units. One tensor enters a block and one
    leaves it.

    Args:
        config_file: JSON file to write.
        model: with its weights, on any device; left untouched.
        input_data: a tuple of tensors for its forward, a bare tensor, a list, or a dict of
            keyword inputs.
        config_defination: protobuf-text ``.cfg`` (message AMCTDistillConfig); None: 8 bits for
            all layers and blocks of one unit. Also accepted as `config_definition`.

    Raises:
        AmctError: naming the argument, file or layer, what was found and what is allowed.
    """
    start_logging(to_file=False)
    inputs = ModelInputs.of(input_data)
    check_writable(config_file, "config_file")
    if config_defination is not None:
        check_distinct(config_defination=config_defination, config_file=config_file)
    message = None if config_defination is None else parse_distill_cfg(config_defination)
    graph = look_at(model, inputs)
    start_logging(to_file=True)
    layers = distillable(graph.layers)
    groups: list[list[str]] = []
    if message is None:
        config = DistillConfig(layers=default_distill_layers(layers))
    else:
        place = str(config_defination)
        config = distill_config_from_cfg(message, layers, graph.module_names, place)
        asked = [(g.start_layer_name, g.end_layer_name) for g in message.distill_group]
        groups = user_groups(graph, asked, list(config.layers), place)
    if not config.layers:
        reasons = "; ".join(f"{layer.name}: {layer.reason}" for layer in layers)
        raise ModelError(f"no layer of the model can be distilled; {reasons or 'it has none'}")
    taken = {name for group in groups for name in group}
    rest = [name for name in config.layers if name not in taken]
    groups += found_groups(graph, rest, config.group_size)
    order = {name: call.index for name, call in graph.calls.items()}
    groups.sort(key=lambda group: order[group[0]])
    config = config.model_copy(update={"distill_group": groups})
    write_whole(config_file, dump_layered(config).encode(), what="config_file")


@public_call
def create_distill_model(
    config_file: PathLike, model: nn.Module, input_data: InputData
) -> nn.Module:
    """A copy of the model with quantized layers, the student of a distillation.

    Args:
        config_file: JSON written by `create_distill_config`.
        model: as given to it; left untouched.
        input_data: example inputs, as there.

    Returns:
        The student, in eval mode, on the model's device. Its layers are quantized once `distill`
        has found their ranges.

    Raises:
        AmctError: naming the argument, file, layer or group, what was found and what is allowed.
    """
    start_logging(to_file=False)
    inputs = ModelInputs.of(input_data)
    graph = look_at(model, inputs)
    config = _config(config_file, graph)
    check_groups(graph, config, str(config_file))
    return create_student(model, graph, config)


@public_call
def distill(
    model: nn.Module,
    compress_model: nn.Module,
    config_file: PathLike,
    train_loader: Iterable[Any],
    epochs: int = 1,
    lr: float = 1e-3,
    sample_instance: DistillSampleBase | None = None,
    loss: Loss | None = None,
    optimizer: MakeOptimizer | torch.optim.Optimizer | None = None,
    *,
    progress_dir: PathLike = PROGRESS,
) -> nn.Module:
    """Trains the student, block after block, to make what the teacher's blocks make.

    A block's input is what the already distilled student makes before it, its target what the
    teacher's block makes; labels are not used (Li et al., BRECQ, arXiv 2102.05426, section 3.2,
    with the inputs of the quantized network). A block keeps the parameters of the epoch with the
    least mean loss, or those it began with. Each batch goes through teacher and student once,
    beside what the training of the blocks costs.

    Finished blocks are kept in `progress_dir` until all are: the same call after an interruption
    goes on behind them, if the loader yields the same batches, and ends with the same result.

    Args:
        model: the float model; left untouched.
        compress_model: what `create_distill_model` returned; left untouched.
        config_file: the JSON that it was created with.
        train_loader: yields batches; it is gone through once, and inputs are kept.
        epochs: passes over all batches for each block, >= 0; with 0 the student only gets the
            ranges of its inputs.
        lr: learning rate of the default optimizer, or of the class given, > 0.
        sample_instance: picks the model's inputs out of a batch; None: a batch is a tensor, a
            tuple or list of the forward's arguments in order, or a dict of keyword inputs, where
            what the forward does not take (labels) is left out.
        loss: of the student's and the teacher's output; None: mean squared error.
        optimizer: class, or function of a list of parameters, that makes a block's optimizer;
            a class gets `lr` too. Also an optimizer of the student's parameters, which is made
            anew with its settings for each block. None: AdamW, its rate falling to 0 in each
            block.
        progress_dir: ours: folder for finished blocks.

    Returns:
        The distilled student, in eval mode, with `outcomes` (`report.ledger.BlockEntry`), one
        for each block: its loss before and after, its time.

    Raises:
        AmctError: naming the argument, file, layer or batch, what was found and what is allowed.
    """
    start_logging(to_file=True)
    _check_settings(epochs, lr, loss)
    batches = list(model_inputs(train_loader, model, sample_instance))
    graph = look_at(model, batches[0])
    config = _config(config_file, graph)
    check_groups(graph, config, str(config_file))
    _check_student(compress_model, config, str(config_file))
    student = copy.deepcopy(compress_model).eval()
    teaching = Teaching(
        epochs=epochs,
        loss=nn.functional.mse_loss if loss is None else loss,
        make_optimizer=_optimizer_maker(optimizer, lr),
        decay=optimizer is None,
        described=(epochs, lr, identity(loss), identity(optimizer)),
    )
    folder = check_writable(Path(progress_dir) / "block", "progress_dir").parent
    outcomes = teach(model, student, graph, config, batches, teaching, folder)
    student.outcomes = outcomes  # type: ignore[assignment]
    return student


@public_call
def save_distill_model(
    model: nn.Module,
    save_path: PathLike,
    input_data: InputData,
    record_file: PathLike | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_axes: DynamicAxes | None = None,
) -> None:
    """Writes the fake-quant and the deploy model of a distilled model.

    Also writes the record and ``<save_path>_ledger.json``, with each block's loss before and
    after, and prints the ledger as a table.

    Args:
        model: what `distill` returned; left untouched.
        save_path: folder and prefix: ``<save_path>_fake_quant_model.onnx`` and
            ``<save_path>_deploy_model.onnx`` are written; with an empty prefix (a path that
            ends with a separator), the names begin at ``fake_quant_model.onnx``.
        input_data: example inputs; layers' errors are measured on them.
        record_file: record to write; None: ``amct_log/distill_record.txt``.
        input_names: names of the ONNX models' inputs.
        output_names: names of their outputs.
        dynamic_axes: ``{name: {axis: label}}`` or ``{name: [axes]}``.

    Raises:
        AmctError: naming the argument, file or layer; nothing is written then.
    """
    start_logging(to_file=False)
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(
            f"model is a {type(model).__name__}; allowed is what distill returned"
        )

    waiting = [n for n, layer in retrain_layers(model).items() if not layer.input_quantizer.ready]
    if waiting:
        raise CalibrationError(
            f"the input ranges of {', '.join(map(repr, waiting))} are not known; call distill and "
            "give what it returns"
        )

    def reasons(graph: ModelGraph) -> Mapping[str, str]:
        trained = set(retrain_layers(model))
        return {
            layer.name: layer.reason or "the config does not quantize it"
            for layer in distillable(graph.layers)
            if layer.name not in trained
        }

    save_trained(
        model,
        ModelInputs.of(input_data),
        RECORD if record_file is None else record_file,
        save_path,
        (input_names, output_names, dynamic_axes),
        flow="save_distill_model",
        reasons=reasons,
        # The interface's distillation leaves the types out of its record.
        beside=RecordFile(plain_types=False),
        blocks=getattr(model, "outcomes", ()),
    )


def _config(config_file: PathLike, graph: ModelGraph) -> DistillConfig:
    config = load_distill_json(config_file, distillable(graph.layers), graph.module_names)
    if not config.enabled_layers():
        raise ConfigError(
            f"{config_file}: no layer is enabled; set quant_enable of at least one layer to true"
        )
    return config


def _check_settings(epochs: object, lr: object, loss: object) -> None:
    if isinstance(epochs, bool) or not isinstance(epochs, int):
        raise ArgumentTypeError(f"epochs is {shown(epochs)}; allowed: an integer >= 0")
    if epochs < 0:
        raise ArgumentValueError(f"epochs is {epochs}; allowed: an integer >= 0")
    if isinstance(lr, bool) or not isinstance(lr, int | float):
        raise ArgumentTypeError(f"lr is {shown(lr)}; allowed: a number > 0")
    if not 0 < lr < float("inf"):
        raise ArgumentValueError(f"lr is {lr}; allowed: a number > 0")
    if loss is not None and not callable(loss):
        raise ArgumentTypeError(
            f"loss is a {type(loss).__name__}; allowed: a function of the student's and the "
            "teacher's output, or None"
        )


def _check_student(student: object, config: DistillConfig, place: str) -> None:
    if not isinstance(student, nn.Module):
        raise ArgumentTypeError(
            f"compress_model is a {type(student).__name__}; allowed is what create_distill_model "
            "returned"
        )
    enabled, held = set(config.enabled_layers()), set(retrain_layers(student))
    if not held:
        raise ModelError(
            "compress_model has no quantized layer; give what create_distill_model returned"
        )
    if enabled != held:
        name = min(enabled ^ held)
        what = "enables" if name in enabled else "does not enable"
        other = "is not" if name in enabled else "is"
        raise ModelError(
            f"{place} {what} layer {name!r}, which {other} quantized in compress_model; give the "
            "config that it was created with"
        )


def _optimizer_maker(
    optimizer: MakeOptimizer | torch.optim.Optimizer | None, lr: float
) -> MakeOptimizer:
    """What makes a block's optimizer.

    Raises:
        ArgumentTypeError: `optimizer` is none of the allowed.
    """
    if optimizer is None:
        return lambda parameters: torch.optim.AdamW(parameters, lr=lr)
    if isinstance(optimizer, torch.optim.Optimizer):
        made: Callable[..., torch.optim.Optimizer] = type(optimizer)
        # `defaults` may hold what is no argument of the class.
        accepted = inspect.signature(made).parameters
        settings = {key: value for key, value in optimizer.defaults.items() if key in accepted}
        return lambda parameters: made(parameters, **settings)
    if isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer):
        kind: Callable[..., torch.optim.Optimizer] = optimizer
        return lambda parameters: kind(parameters, lr=lr)
    if callable(optimizer) and not isinstance(optimizer, type):
        return optimizer
    raise ArgumentTypeError(
        f"optimizer is a {type(optimizer).__name__}; allowed: a class of torch.optim, a function "
        "of a list of parameters, an optimizer, or None"
    )
