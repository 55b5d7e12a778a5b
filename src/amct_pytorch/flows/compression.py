"""Sparsity and quantization-aware training together: one config, one record, one call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from amct_pytorch.config.cfg_file import parse_retrain_cfg
from amct_pytorch.config.prune_cfg import prune_config_from_cfg
from amct_pytorch.config.retrain import RetrainConfig, retrainable
from amct_pytorch.config.retrain_cfg import asks_for_quantization, retrain_config_from_cfg
from amct_pytorch.config.retrain_json import tell_of_layers
from amct_pytorch.errors import ConfigError, ModelError
from amct_pytorch.files import PathLike, check_distinct, check_writable
from amct_pytorch.flows.arguments import public_call
from amct_pytorch.flows.channel_pruning import kept_ledger
from amct_pytorch.flows.checkpoint import load_checkpoint
from amct_pytorch.flows.preparation import InputData
from amct_pytorch.flows.pruning import prune, prune_again, save_pruned, what_is_asked
from amct_pytorch.flows.retraining import quantized_for_training
from amct_pytorch.flows.trained_files import begin_record, save_trained
from amct_pytorch.graph.layers import LAYER_KINDS, SeenLayer
from amct_pytorch.graph.look import look_at
from amct_pytorch.graph.tensors import ModelInputs
from amct_pytorch.logs import start_logging
from amct_pytorch.nn.retrain import RetrainLayer, retrain_layers
from amct_pytorch.nn.sparse import TwoOfFourLayer, sparse_layers
from amct_pytorch.nn.wrapped import INNER
from amct_pytorch.processes import rank
from amct_pytorch.proto import AMCTRetrainConfig
from amct_pytorch.record.record_file import (
    RecordFile,
    parse_record,
    read_record,
    record_text,
    write_record,
)
from amct_pytorch.record.selective import add_masks, has_selective

if TYPE_CHECKING:
    from amct_pytorch.export.float_model import DynamicAxes

# Attributes of a compressed model, which copies and pickles keep: the record of what was pruned,
# as text, and why layers are not quantized, by name.
PRUNED = "amct_prune_record"
LEFT_FLOAT = "amct_left_float"


@public_call
def create_compressed_retrain_model(
    model: nn.Module,
    input_data: InputData,
    config_defination: PathLike,
    record_file: PathLike,
) -> nn.Module:
    """A copy of the model to train on, sparse and then quantized.

    First channels are pruned or layers made 2:4 sparse, as `create_prune_retrain_model` does;
    then the layers of what is left are quantized, as `create_quant_retrain_model` does. The
    quantizer sees the sparse weights, and their zeros stay zero.

    Args:
        model: with its weights, on any device; left untouched.
        input_data: a tuple of tensors for its forward, a bare tensor, a list, or a dict of
            keyword inputs.
        config_defination: protobuf-text ``.cfg`` (message AMCTRetrainConfig) with a
            `prune_config`, a quantization part (`retrain_data_quant_config`,
            `retrain_weight_quant_config`), or both. Also accepted as `config_definition`.
        record_file: record file to write: what was pruned, and factors, which each inference
            pass in eval mode brings up to date.

    Returns:
        The model to train, on the model's device, its modules in training or eval mode as the
        model's are.

    Raises:
        AmctError: naming the argument, file or layer, what was found and what is allowed;
            nothing is written then.
    """
    return _created(model, input_data, config_defination, record_file)


@public_call
def restore_compressed_retrain_model(
    model: nn.Module,
    input_data: InputData,
    config_defination: PathLike,
    record_file: PathLike,
    pth_file: PathLike,
    state_dict_name: str | None = None,
) -> nn.Module:
    """The compressed model again, as it was when its state dict was saved.

    What is pruned comes from the record; ranges, masks and weights from the checkpoint.

    Args:
        model: as given to `create_compressed_retrain_model`; left untouched.
        input_data: example inputs, as there.
        config_defination: the ``.cfg`` given there.
        record_file: the record that was written there; factors in it are brought up to date.
        pth_file: checkpoint that ``torch.save`` wrote; read as data only, no code in it runs.
            Also accepted as `save_pth_path`.
        state_dict_name: key of the state dict inside the checkpoint; None: it is the state
            dict. A ``module.`` before all names (DistributedDataParallel's) is taken off.

    Raises:
        AmctError: naming the argument, file or layer: the first that differs where the model
            does not fit the record.
    """
    return _created(model, input_data, config_defination, record_file, (pth_file, state_dict_name))


@public_call
def save_compressed_retrain_model(
    model: nn.Module,
    record_file: PathLike,
    save_path: PathLike,
    input_data: InputData,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_axes: DynamicAxes | None = None,
) -> None:
    """Writes the fake-quant and the deploy model of a compressed model.

    With sparsity alone both hold the same float model. Also brings `record_file` up to date and
    writes ``<save_path>_ledger.json``. The model can go on training afterwards. Of several
    processes the first one writes.

    Args:
        model: what `create_compressed_retrain_model` or `restore_compressed_retrain_model`
            returned, trained; inside DistributedDataParallel or not. Left untouched.
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
    names = (input_names, output_names, dynamic_axes)
    flow = "save_compressed_retrain_model"
    record = _record_of(inner)
    if retrain_layers(inner):
        save_trained(
            inner,
            inputs,
            record_file,
            save_path,
            names,
            flow=flow,
            reasons=lambda graph: getattr(inner, LEFT_FLOAT, {}),
            beside=record,
            notes=_notes(inner),
        )
        return
    check_writable(record_file, "record_file")
    save_pruned(inner, inputs, save_path, names, flow)
    if rank() == 0:
        write_record(record_file, record, announce=False)


def _created(
    model: nn.Module,
    input_data: InputData,
    cfg: PathLike,
    record_file: PathLike,
    checkpoint: tuple[PathLike, str | None] | None = None,
) -> nn.Module:
    start_logging(to_file=False)
    inputs = ModelInputs.of(input_data)
    check_distinct(config_defination=cfg, record_file=record_file)
    record_path = check_writable(record_file, "record_file")
    message = parse_retrain_cfg(cfg)
    prunes, quantizes = message.HasField("prune_config"), asks_for_quantization(message)
    if not prunes and not quantizes:
        _refuse(message, cfg)
    compressed, record = model, RecordFile()
    if prunes:
        asked = what_is_asked(model, inputs, message, cfg)
        if checkpoint is None:
            compressed, record = prune(model, inputs, asked)
        else:
            read = read_record(record_file)
            compressed = prune_again(model, inputs, asked, read)
            record.message.prune_record.extend(read.message.prune_record)
    else:  # tells of overrides that have no effect
        prune_config_from_cfg(message, (), (), str(cfg))
    if quantizes:
        compressed = _quantized(compressed, inputs, message, cfg)
    setattr(compressed, PRUNED, record_text(record, str(record_file)))
    if checkpoint is not None:
        load_checkpoint(compressed, *checkpoint)
    start_logging(to_file=True)
    _begin(compressed, inputs, record_path, record, quantizes, checkpoint is None)
    return compressed


def _begin(
    model: nn.Module,
    inputs: ModelInputs,
    path: Path,
    record: RecordFile,
    quantizes: bool,
    new: bool,
) -> None:
    if quantizes:
        begin_record(model, inputs, path, record, announce=new)
    elif new and rank() == 0:
        write_record(path, record)


def _refuse(message: AMCTRetrainConfig, cfg: PathLike) -> None:
    """Says that a config asks for nothing."""
    overrides = [f"override_layer_configs[{e.layer_name}]" for e in message.override_layer_configs]
    overrides += [f"override_layer_types[{e.layer_type}]" for e in message.override_layer_types]
    only = f"; it has only overrides ({overrides[0]}), which switch nothing on" if overrides else ""
    raise ConfigError(
        f"{cfg}: it asks for nothing: prune_config, retrain_data_quant_config and "
        f"retrain_weight_quant_config are missing; allowed: at least one of them{only}"
    )


def _quantized(
    model: nn.Module, inputs: ModelInputs, message: AMCTRetrainConfig, cfg: PathLike
) -> nn.Module:
    """A copy of a model, sparse or not, whose layers are quantized in training."""
    graph = look_at(model, inputs, LAYER_KINDS)
    layers = retrainable(graph.layers)
    config = retrain_config_from_cfg(
        _without_pruning(message), layers, graph.module_names, str(cfg)
    )
    trained = quantized_for_training(model, graph, config)
    tell_of_layers(layers, config)
    setattr(trained, LEFT_FLOAT, _left_float(layers, config))
    return trained


def _without_pruning(message: AMCTRetrainConfig) -> AMCTRetrainConfig:
    """The message without overrides that are about sparsity only."""
    result = AMCTRetrainConfig()
    result.CopyFrom(message)
    for field in ("override_layer_configs", "override_layer_types"):
        entries = getattr(result, field)
        kept = [entry for entry in entries if asks_for_quantization(entry)]
        del entries[:]
        entries.extend(kept)
    return result


def _left_float(layers: Sequence[SeenLayer], config: RetrainConfig) -> dict[str, str]:
    """Why each layer that is not quantized is not."""
    enabled = config.enabled_layers()
    return {
        layer.name: layer.reason or "the config skips it"
        for layer in layers
        if layer.name not in enabled
    }


def _record_of(model: nn.Module) -> RecordFile:
    """The record of what was pruned, with the present masks.

    Raises:
        ModelError: the model is not one of these flows'.
    """
    text = getattr(model, PRUNED, None)
    if text is None:
        raise ModelError(
            "the model is not what create_compressed_retrain_model or "
            "restore_compressed_retrain_model returned; give that module itself"
        )
    record = RecordFile()
    held = parse_record(text, "what was pruned")
    if has_selective(held):
        masks = {name: layer.sparse_mask for name, layer in _sparse(model).items()}
        add_masks(record, masks)
    else:
        record.message.prune_record.extend(held.message.prune_record)
    return record


def _sparse(model: nn.Module) -> dict[str, TwoOfFourLayer]:
    """Sparse layers by the names they have in the user's model."""
    quantized = {
        f"{path}.{INNER}": module.name
        for path, module in model.named_modules()
        if isinstance(module, RetrainLayer)
    }
    return {quantized.get(path, path): layer for path, layer in sparse_layers(model).items()}


def _notes(model: nn.Module) -> dict[str, str]:
    """What sparsity did, for the ledger of quantization."""
    notes = {}
    for name, layer in _sparse(model).items():
        mask = layer.sparse_mask
        notes[name] = f"2:4 sparse: {int(mask.sum())} of {mask.numel()} weights kept"
    ledger = kept_ledger(model)
    if ledger is not None:
        notes[""] = f"channels pruned: {ledger.summary()}"
        for entry in ledger.layers:
            before, after = entry.channels
            if after < before:
                notes[entry.name] = f"{after} of {before} output channels kept"
    return notes
