"""Quantization-aware training of a whole model: config, training module, restoring, saving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from amct_pytorch.config.cfg_file import parse_retrain_cfg
from amct_pytorch.config.layer_rules import why_not_packed
from amct_pytorch.config.layered_json import dump_layered
from amct_pytorch.config.retrain import BITS, RetrainConfig, retrainable
from amct_pytorch.config.retrain_cfg import retrain_config_from_cfg
from amct_pytorch.config.retrain_json import (
    default_retrain_config,
    load_retrain_json,
    tell_of_layers,
)
from amct_pytorch.errors import ModelError
from amct_pytorch.files import PathLike, check_distinct, check_writable, write_whole
from amct_pytorch.flows.arguments import public_call
from amct_pytorch.flows.checkpoint import load_checkpoint
from amct_pytorch.flows.preparation import InputData
from amct_pytorch.flows.trained_files import begin_record, save_trained
from amct_pytorch.graph.activations import behind_relu
from amct_pytorch.graph.layers import LAYER_KINDS
from amct_pytorch.graph.look import ModelGraph, copy_model, look_at
from amct_pytorch.graph.tensors import ModelInputs
from amct_pytorch.logs import logger, start_logging
from amct_pytorch.nn.retrain import TrainedQuantization, instrument_for_training, retrain_layers

if TYPE_CHECKING:
    from amct_pytorch.export.float_model import DynamicAxes


@public_call
def create_quant_retrain_config(
    config_file: PathLike,
    model: nn.Module,
    input_data: InputData,
    config_defination: PathLike | None = None,
) -> None:
    """Finds every layer whose quantization can be trained and writes the config as JSON.

    The layers are Conv1d, Conv2d, ConvTranspose1d, ConvTranspose2d (padding_mode zeros, input
    with a batch dimension) and Linear. The model
    is run once on `input_data`, in eval mode, to see them. Layers that cannot be trained
    (reused, tied, never run, …) are left out with a log line that says why.

    Args:
        config_file: JSON file to write.
        model: with its weights, on any device; left untouched.
        input_data: a tuple of tensors for its forward, a bare tensor, a list, or a dict of
            keyword inputs.
        config_defination: protobuf-text ``.cfg`` (message AMCTRetrainConfig), of which the
            quantization part counts; None: 8 bits for all layers. Also accepted as
            `config_definition`.

    Raises:
        AmctError: naming the argument, file or layer, what was found and what is allowed.
    """
    start_logging(to_file=False)
    inputs = ModelInputs.of(input_data)
    check_writable(config_file, "config_file")
    if config_defination is not None:
        check_distinct(config_defination=config_defination, config_file=config_file)
    message = None if config_defination is None else parse_retrain_cfg(config_defination)
    _check_float(model)
    graph = look_at(model, inputs, LAYER_KINDS)
    start_logging(to_file=True)
    layers = retrainable(graph.layers)
    if message is None:
        config = default_retrain_config(layers)
    else:
        config = retrain_config_from_cfg(
            message, layers, graph.module_names, str(config_defination)
        )
        if message.HasField("prune_config"):
            logger.warning(
                "%s: prune_config does nothing in quantization-aware training alone; "
                "create_compressed_retrain_model does both",
                config_defination,
            )
    if not config.layers:
        raise ModelError(_nothing_to_train(graph))
    tell_of_layers(layers, config)
    write_whole(config_file, dump_layered(config).encode(), what="config_file")


@public_call
def create_quant_retrain_model(
    config_file: PathLike,
    model: nn.Module,
    record_file: PathLike,
    input_data: InputData,
) -> nn.Module:
    """A copy of the model to train with quantized layers.

    Train it as you would train the model itself. The first `batch_num` training batches run in
    float and are observed for the ranges of the inputs, which are learned from then on. In
    `eval()` it computes what will be deployed, and each inference pass brings `record_file` up
    to date.

    On several processes give it to `torch.nn.parallel.DistributedDataParallel`; the first
    process writes the record.

    Args:
        config_file: JSON written by `create_quant_retrain_config`.
        model: as given to it; left untouched.
        record_file: record file to write.
        input_data: example inputs, as there.

    Returns:
        The model to train, on the model's device, its modules in training or eval mode as the
        model's are.

    Raises:
        AmctError: naming the argument, file or layer, what was found and what is allowed;
            nothing is written then.
    """
    return _created(config_file, model, record_file, input_data)


@public_call
def restore_quant_retrain_model(
    config_file: PathLike,
    model: nn.Module,
    record_file: PathLike,
    input_data: InputData,
    pth_file: PathLike,
    state_dict_name: str | None = None,
) -> nn.Module:
    """The model to train again, as it was when its state dict was saved.

    Args:
        config_file: the JSON that it was created with.
        model: as given to `create_quant_retrain_model`; left untouched.
        record_file: record file to write.
        input_data: example inputs, as there.
        pth_file: checkpoint that ``torch.save`` wrote; read as data only, no code in it runs.
            Also accepted as `save_pth_path`.
        state_dict_name: key of the state dict inside the checkpoint; None: it is the state
            dict. A ``module.`` before all names (DistributedDataParallel's) is taken off.

    Returns:
        As `create_quant_retrain_model`.

    Raises:
        AmctError: naming the argument, file, layer or key, what was found and what is allowed;
            nothing is written then.
    """
    check_distinct(config_file=config_file, record_file=record_file, pth_file=pth_file)
    return _created(config_file, model, record_file, input_data, (pth_file, state_dict_name))


@public_call
def save_quant_retrain_model(
    config_file: PathLike,
    model: nn.Module,
    record_file: PathLike,
    save_path: PathLike,
    input_data: InputData,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_axes: DynamicAxes | None = None,
) -> None:
    """Writes the fake-quant and the deploy model of a trained model.

    BatchNorm is folded in. Also brings `record_file` up to date, writes
    ``<save_path>_ledger.json`` and prints the ledger as a table. The model can go on training
    afterwards. Of several processes the first one writes.

    Args:
        config_file: the JSON that the model was created with.
        model: what `create_quant_retrain_model` or `restore_quant_retrain_model` returned,
            trained; inside DistributedDataParallel or not. Left untouched.
        record_file: record file to write.
        save_path: folder and prefix: ``<save_path>_fake_quant_model.onnx`` and
            ``<save_path>_deploy_model.onnx`` are written; with an empty prefix (a path that
            ends with a separator), the names begin at ``fake_quant_model.onnx``.
        input_data: example inputs, as there; layers' errors are measured on them.
        input_names: names of the ONNX models' inputs.
        output_names: names of their outputs.
        dynamic_axes: ``{name: {axis: label}}`` or ``{name: [axes]}``.

    Raises:
        AmctError: naming the argument, file or layer (one that has not seen its `batch_num`
            training batches, say); nothing is written then.
    """
    start_logging(to_file=False)
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    inputs = ModelInputs.of(input_data)
    check_distinct(config_file=config_file, record_file=record_file)
    save_trained(
        inner,
        inputs,
        record_file,
        save_path,
        (input_names, output_names, dynamic_axes),
        flow="save_quant_retrain_model",
        reasons=lambda graph: _reasons(config_file, graph, inner),
    )


def _created(
    config_file: PathLike,
    model: nn.Module,
    record_file: PathLike,
    input_data: InputData,
    checkpoint: tuple[PathLike, str | None] | None = None,
) -> nn.Module:
    start_logging(to_file=False)
    inputs = ModelInputs.of(input_data)
    check_distinct(config_file=config_file, record_file=record_file)
    record_path = check_writable(record_file, "record_file")
    _check_float(model)
    graph = look_at(model, inputs, LAYER_KINDS)
    layers = retrainable(graph.layers)
    config = load_retrain_json(config_file, layers, graph.module_names)
    trained = quantized_for_training(model, graph, config)
    if checkpoint is not None:
        load_checkpoint(trained, *checkpoint)
    start_logging(to_file=True)
    # A model that is restored goes on with the record that it had.
    begin_record(trained, inputs, record_path, announce=checkpoint is None)
    return trained


def _check_float(model: nn.Module) -> None:
    if isinstance(model, nn.Module) and retrain_layers(model):
        raise ModelError(
            "the model is in quantization-aware training already; give the float model, and with "
            "it the trained state to restore_quant_retrain_model"
        )


def quantized_for_training(model: nn.Module, graph: ModelGraph, config: RetrainConfig) -> nn.Module:
    """A copy of a model with the layers that a config enables made trainable in quantization.

    Args:
        model: the model that was looked at; left untouched.
        graph: what the look found.
        config: which layers, and how.

    Raises:
        ModelError: the model cannot be copied, or holds NaN or infinity.
    """
    copied = copy_model(model)
    for original, module in zip(model.modules(), copied.modules(), strict=True):
        module.training = original.training
    instrument_for_training(copied, graph, training_settings(config, graph))
    return copied


def training_settings(config: RetrainConfig, graph: ModelGraph) -> dict[str, TrainedQuantization]:
    """How each enabled layer is quantized, by name."""
    seen = {layer.name: layer for layer in graph.layers}
    settings = {}
    for name, layer in config.enabled_layers().items():
        data, weights = layer.retrain_data_config, layer.retrain_weight_config
        fixed_min = data.fixed_min
        if fixed_min is None and data.clip_min is None and behind_relu(graph, name):
            fixed_min = True
        settings[name] = TrainedQuantization(
            activation_bits=BITS[data.dst_type],
            weight_bits=BITS[weights.dst_type],
            weight_algorithm=weights.algo,
            channel_wise=weights.channel_wise,
            batch_num=config.batch_num,
            clip_max=data.clip_max,
            clip_min=data.clip_min,
            fixed_min=fixed_min,
            symmetric=LAYER_KINDS[seen[name].kind].symmetric_inputs,
            packed=why_not_packed(seen[name]) is None,
            fakequant_precision_mode=config.fakequant_precision_mode or "DEFAULT",
        )
    return settings


def _reasons(config_file: PathLike, graph: ModelGraph, model: nn.Module) -> Mapping[str, str]:
    """Why each layer of a look that is not in training is not; see `save_trained`.

    Raises:
        ModelError: the config enables other layers than are trained.
    """
    layers = retrainable(graph.layers)
    config = load_retrain_json(config_file, layers, graph.module_names)
    enabled, trained = set(config.enabled_layers()), set(retrain_layers(model))
    if enabled != trained:
        name = min(enabled ^ trained)
        what = "enables" if name in enabled else "does not enable"
        other = "is not" if name in enabled else "is"
        raise ModelError(
            f"{config_file} {what} layer {name!r}, which {other} quantized in the model; give the "
            "config that the model was created with"
        )
    reasons = {}
    for layer in layers:
        if layer.reason is not None:
            reasons[layer.name] = layer.reason
        elif layer.name not in config.layers:
            reasons[layer.name] = "it is not in the config"
        elif layer.name not in trained:
            reasons[layer.name] = "the config says retrain_enable false"
    return reasons


def _nothing_to_train(graph: ModelGraph) -> str:
    layers = retrainable(graph.layers)
    if not layers:
        return "the model has no layer that can be trained with quantization"
    reasons = "; ".join(f"{layer.name or 'the model'}: {layer.reason}" for layer in layers)
    return f"no layer of the model can be trained with quantization; {reasons}"
