"""The student: a copy of the model whose layers are quantized as the config says."""

from __future__ import annotations

from torch import nn

from amct_pytorch.config.distill import DistillConfig
from amct_pytorch.config.retrain import RetrainConfig, RetrainLayerConfig
from amct_pytorch.errors import ConfigError, ModelError, ProblemList
from amct_pytorch.flows.retraining import training_settings
from amct_pytorch.graph.blocks import find_block
from amct_pytorch.graph.look import ModelGraph, copy_model
from amct_pytorch.nn.retrain import TrainedQuantization, instrument_for_training

# The algorithms of training have other names where they distill.
ALGORITHMS = {"arq_distill": "arq_retrain", "ulq_distill": "ulq_retrain"}


def create_student(model: nn.Module, graph: ModelGraph, config: DistillConfig) -> nn.Module:
    """A copy of the model, in eval mode, with its enabled layers quantized.

    Raises:
        ModelError: the model cannot be copied, or holds NaN or infinity.
    """
    student = copy_model(model)
    instrument_for_training(student, graph, settings_of(config, graph))
    return student.eval()


def settings_of(config: DistillConfig, graph: ModelGraph) -> dict[str, TrainedQuantization]:
    """How each enabled layer is quantized, by name."""
    layers = {
        name: RetrainLayerConfig.model_validate(
            {
                "retrain_data_config": layer.distill_data_config,
                "retrain_weight_config": {
                    **layer.distill_weight_config.model_dump(),
                    "algo": ALGORITHMS[layer.distill_weight_config.algo],
                },
            }
        )
        for name, layer in config.enabled_layers().items()
    }
    return training_settings(RetrainConfig(batch_num=config.batch_num, layers=layers), graph)


def check_groups(graph: ModelGraph, config: DistillConfig, place: str) -> None:
    """Refuses groups that are no blocks of the model.

    Raises:
        ConfigError: all of them in one error.
    """
    problems = ProblemList(place, ConfigError)
    for number, group in enumerate(config.distill_group):
        where = f"distill_group[{number}]"
        silent = [name for name in group if name not in graph.calls]
        if silent:
            problems.add(f"{where}: {silent[0]} does not run exactly once on input_data")
            continue
        try:
            block = find_block(graph.trace, graph.calls, group[0], group[-1])
        except ModelError as error:
            problems.add(f"{where}: {error}")
            continue
        known = [name for name in block.layers if name in config.layers]
        if known != group:
            problems.add(
                f"{where} is {', '.join(group)}; from its first to its last layer run "
                f"{', '.join(known)}, in this order"
            )
    problems.raise_if_any()
