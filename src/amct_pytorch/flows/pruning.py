"""Sparsity of a whole model: the model to train, the same restored, and the files it becomes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from amct_pytorch.config.cfg_file import parse_retrain_cfg
from amct_pytorch.config.prune_cfg import (
    CHANNELS,
    TWO_OF_FOUR,
    PruneConfig,
    prune_config_from_cfg,
)
from amct_pytorch.errors import ConfigError, ModelError, RecordError
from amct_pytorch.files import PathLike, WholeFiles, check_distinct, check_writable
from amct_pytorch.flows.arguments import public_call
from amct_pytorch.flows.channel_pruning import (
    ByConfig,
    channel_graph,
    channel_layers,
    keep_ledger,
    kept_ledger,
    prune_channels,
    pruning_ledger,
)
from amct_pytorch.flows.checkpoint import load_checkpoint
from amct_pytorch.flows.outputs import output_path
from amct_pytorch.flows.preparation import InputData, Names
from amct_pytorch.flows.two_of_four import (
    SparsePlan,
    check_same_layers,
    make_model_sparse,
    masks_of,
    prunable,
    sparsity_ledger,
)
from amct_pytorch.graph.coupling.graph import ChannelGraph
from amct_pytorch.graph.look import ModelGraph, look_at
from amct_pytorch.graph.tensors import ModelInputs
from amct_pytorch.logs import start_logging
from amct_pytorch.nn.instrument import instrument
from amct_pytorch.nn.retrain import retrain_layers
from amct_pytorch.nn.sparse import sparse_layers
from amct_pytorch.processes import rank
from amct_pytorch.proto import AMCTRetrainConfig
from amct_pytorch.record.prune_groups import gone_of_record, has_channels, prune_records
from amct_pytorch.record.record_file import RecordFile, read_record, write_record
from amct_pytorch.record.selective import add_masks, has_selective, selective_nodes
from amct_pytorch.report.layer_facts import traced_network
from amct_pytorch.report.pruning import PruningLedger, pruning_table
from amct_pytorch.report.sparsity import SparsityLedger

if TYPE_CHECKING:
    from amct_pytorch.export.float_model import DynamicAxes


@public_call
def create_prune_retrain_model(
    model: nn.Module,
    input_data: InputData,
    config_defination: PathLike,
    record_file: PathLike,
) -> nn.Module:
    """A sparse copy of the model, to train on.

    Channel pruning (`filter_pruner`): output channels of Conv2d and Linear layers are taken out,
    and with them everything that hangs together with them: BatchNorms, depthwise convolutions,
    what is added or concatenated, the inputs of the next layers. What is returned is a network
    of ordinary modules of smaller size. What cannot be followed safely stays whole, with the
    reason in the log and in the ledger that `save_prune_retrain_model` writes.

    2:4 sparsity (`n_out_of_m_pruner`): of each four consecutive weights along the input channels
    of Linear, Conv2d and ConvTranspose2d layers the two largest stay. They are selected anew in
    the first training batch and then every `update_freq` batches (0: never again). Gradients go
    to all weights.

    Args:
        model: with its weights, on any device; left untouched.
        input_data: a tuple of tensors for its forward, a bare tensor, a list, or a dict of
            keyword inputs.
        config_defination: protobuf-text ``.cfg`` (message AMCTRetrainConfig) with a global
            `prune_config`. Also accepted as `config_definition`.
        record_file: record file to write: what was pruned.

    Returns:
        The model to train, on the model's device, its modules in training or eval mode as the
        model's are. With 2:4 its state dict holds the masks too.

    Raises:
        AmctError: naming the argument, file or layer, what was found and what is allowed;
            nothing is written then.
    """
    start_logging(to_file=False)
    inputs = ModelInputs.of(input_data)
    check_distinct(config_defination=config_defination, record_file=record_file)
    check_writable(record_file, "record_file")
    asked = what_is_asked(model, inputs, parse_retrain_cfg(config_defination), config_defination)
    start_logging(to_file=True)
    sparse, record = prune(model, inputs, asked)
    if rank() == 0:
        write_record(record_file, record)
    return sparse


@public_call
def restore_prune_retrain_model(
    model: nn.Module,
    input_data: InputData,
    record_file: PathLike,
    config_defination: PathLike,
    pth_file: PathLike,
    state_dict_name: str | None = None,
) -> nn.Module:
    """The sparse model again, as it was when its state dict was saved.

    What is pruned comes from the record, not from the weights; for 2:4 the checkpoint has the
    present masks and the number of batches seen, so that training goes on where it was.

    Args:
        model: as given to `create_prune_retrain_model`; left untouched.
        input_data: example inputs, as there.
        record_file: the record that was written there.
        config_defination: the ``.cfg`` given there.
        pth_file: checkpoint that ``torch.save`` wrote; read as data only, no code in it runs.
            Also accepted as `save_pth_path`.
        state_dict_name: key of the state dict inside the checkpoint; None: it is the state
            dict. A ``module.`` before all names (DistributedDataParallel's) is taken off.

    Raises:
        AmctError: naming the argument, file or layer: the first that differs where the model
            does not fit the record.
    """
    start_logging(to_file=False)
    inputs = ModelInputs.of(input_data)
    record = read_record(record_file)
    asked = what_is_asked(model, inputs, parse_retrain_cfg(config_defination), config_defination)
    sparse = prune_again(model, inputs, asked, record)
    load_checkpoint(sparse, pth_file, state_dict_name)
    return sparse


@public_call
def save_prune_retrain_model(
    model: nn.Module,
    save_path: PathLike,
    input_data: InputData,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_axes: DynamicAxes | None = None,
) -> None:
    """Writes a sparse model as ONNX: its channels gone, or its zeros in the weights.

    Both files hold the same float model: sparsity alone quantizes nothing. Also writes
    ``<save_path>_ledger.json``. The model can go on training afterwards. Of several processes
    the first one writes.

    Args:
        model: what `create_prune_retrain_model` or `restore_prune_retrain_model` returned,
            trained; inside DistributedDataParallel or not. Left untouched.
        save_path: folder and prefix: ``<save_path>_fake_quant_model.onnx`` and
            ``<save_path>_deploy_model.onnx`` are written; with an empty prefix (a path that
            ends with a separator), the names begin at ``fake_quant_model.onnx``.
        input_data: example inputs, as there.
        input_names: names of the ONNX models' inputs.
        output_names: names of their outputs.
        dynamic_axes: ``{name: {axis: label}}`` or ``{name: [axes]}``.

    Raises:
        AmctError: naming the argument, file or layer; nothing is written then.
    """
    start_logging(to_file=False)
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    inputs = ModelInputs.of(input_data)
    if isinstance(inner, nn.Module) and retrain_layers(inner):
        raise ModelError(
            "the model is quantized in training as well; give it to save_compressed_retrain_model"
        )
    save_pruned(inner, inputs, save_path, (input_names, output_names, dynamic_axes))


@dataclass(frozen=True)
class Asked:
    """What a config asks of a model.

    Attributes:
        graph: what a look at the model found.
        config: the plan for each layer.
        channels: the model's channels, where they are to be pruned.
        source: the config's file, for messages.
        seconds: wall time of finding out.
    """

    graph: ModelGraph
    config: PruneConfig
    channels: ChannelGraph | None
    source: str
    seconds: float


def what_is_asked(
    model: nn.Module, inputs: ModelInputs, message: AMCTRetrainConfig, cfg: PathLike
) -> Asked:
    """What a look at the model finds, and what the config makes of it.

    Args:
        model: left untouched.
        inputs: to run it on.
        message: of the config.
        cfg: its file, for messages.

    Raises:
        ConfigError: see `prune_config_from_cfg`; or the config asks for no sparsity.
        ModelError: the model is 2:4 sparse, or in quantization-aware training, already.
    """
    began = time.perf_counter()
    _check_plain(model)
    graph = look_at(model, inputs)
    channels = None
    layers = prunable(graph)
    if message.prune_config.HasField(CHANNELS):
        channels = channel_graph(model, inputs, graph)
        layers = channel_layers(graph, channels)
    config = prune_config_from_cfg(message, layers, graph.module_names, str(cfg))
    if config is None:
        raise ConfigError(
            f"{cfg}: it asks for no sparsity: prune_config is missing; allowed in it: "
            "filter_pruner or n_out_of_m_pruner"
        )
    return Asked(graph, config, channels, str(cfg), time.perf_counter() - began)


def _check_plain(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        return  # the look says so
    if retrain_layers(model):
        raise ModelError(
            "the model is in quantization-aware training already; give the float model"
        )
    sparse = sparse_layers(model)
    if sparse:
        raise ModelError(
            f"the model is 2:4 sparse already ({next(iter(sparse)) or 'itself'} first); give the "
            "dense model, and with it the trained state to the restore function of its flow"
        )


def prune(model: nn.Module, inputs: ModelInputs, asked: Asked) -> tuple[nn.Module, RecordFile]:
    """A sparse copy of a model, and the record of what was pruned.

    Raises:
        AmctError: nothing can be pruned, or the model cannot be copied or run.
    """
    record = RecordFile()
    if asked.channels is not None:
        choice = ByConfig(model, asked.config)
        pruned = prune_channels(model, inputs, asked.channels, choice)
        seconds = {"look and follow": asked.seconds}
        keep_ledger(pruned.model, pruning_ledger(model, pruned, inputs, choice, seconds))
        record.message.prune_record.extend(prune_records(pruned.graph.groups, pruned.gone))
        return pruned.model, record
    plan = SparsePlan.of(asked.config, asked.graph, asked.source)
    sparse = make_model_sparse(model, asked.graph, inputs, plan)
    plan.tell()
    add_masks(record, masks_of(sparse))
    return sparse, record


def prune_again(
    model: nn.Module, inputs: ModelInputs, asked: Asked, record: RecordFile
) -> nn.Module:
    """A copy of a model with the structure that a record has.

    Raises:
        RecordError: naming the first difference between record, config and model.
    """
    config = asked.config
    kinds = {TWO_OF_FOUR: has_selective(record), CHANNELS: has_channels(record)}
    if not kinds[config.kind] and any(kinds.values()):
        raise RecordError(
            f"{record.source} is not the record of {asked.source}, which asks for {config.kind}"
        )
    if asked.channels is not None:
        pruned = prune_channels(
            model, inputs, asked.channels, lambda channels: gone_of_record(record, channels)
        )
        keep_ledger(pruned.model, pruning_ledger(model, pruned, inputs))
        return pruned.model
    recorded = selective_nodes(record, asked.graph.layers)
    plan = SparsePlan.of(config, asked.graph, asked.source)
    check_same_layers(plan, recorded, record.source, asked.source)
    return make_model_sparse(model, asked.graph, inputs, plan, recorded)


def save_pruned(
    model: nn.Module,
    inputs: ModelInputs,
    save_path: PathLike,
    names: Names,
    flow: str = "save_prune_retrain_model",
) -> None:
    """Writes a sparse model that is not quantized; see `save_prune_retrain_model`.

    Args:
        model: the module itself.
        inputs: example inputs.
        save_path: see there.
        names: `input_names`, `output_names` and `dynamic_axes`.
        flow: name of the public function, for the ledger.

    Raises:
        AmctError: see there.
    """
    from amct_pytorch.export.deploy import build_deploy
    from amct_pytorch.export.float_model import (
        check_exportable,
        check_names,
        check_output_count,
        export_float,
    )
    from amct_pytorch.export.onnx_file import save_onnx

    began = time.perf_counter()
    input_names, output_names, dynamic_axes = names
    targets = {name: output_path(save_path, name) for name in ("fake_quant", "deploy", "ledger")}
    for path in targets.values():
        check_writable(path, "save_path")
    check_names(inputs, input_names, output_names, dynamic_axes)
    graph = look_at(model, inputs)
    check_output_count(output_names, len(graph.trace.outputs))
    check_exportable(graph.trace)
    baked = instrument(model, graph, inputs, sparse_layers(model), {})
    if rank() != 0:
        return
    start_logging(to_file=True)
    float_model = export_float(
        baked,
        inputs,
        input_names=input_names,
        output_names=output_names,
        dynamic_axes=dynamic_axes,
    )
    plain = build_deploy(float_model, {})
    ledger: SparsityLedger | PruningLedger
    ledger = kept_ledger(model) or sparsity_ledger(model, tuple(prunable(graph)))
    ledger.flow = flow
    ledger.network = traced_network(graph)
    with WholeFiles() as files:
        for name in ("fake_quant", "deploy"):
            ledger.bytes[name] = save_onnx(
                plain, targets[name], what="save_path", external_suffix="", files=files
            )
        ledger.seconds["save"] = time.perf_counter() - began
        files.write(targets["ledger"], ledger.to_json().encode(), what="save_path")
    if isinstance(ledger, PruningLedger):
        print(pruning_table(ledger))
