"""What the sparsity part of a .cfg (message AMCTRetrainConfig) means for a model's layers."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from amct_pytorch.config.cfg_block import shortest
from amct_pytorch.config.overrides import Overrides
from amct_pytorch.errors import ConfigError, ProblemList
from amct_pytorch.graph.layers import SeenLayer
from amct_pytorch.proto import AMCTRetrainConfig

logger = logging.getLogger("amct_pytorch")

CHANNELS = "filter_pruner"
TWO_OF_FOUR = "n_out_of_m_pruner"
# Types of layers that each kind of sparsity prunes by itself.
KINDS = {
    CHANNELS: ("Conv2d", "Linear"),
    TWO_OF_FOUR: ("Conv2d", "ConvTranspose2d", "Linear"),
}
_ALGORITHMS = {
    CHANNELS: ("filter_prune_algo", "balanced_l2_norm_filter_prune"),
    TWO_OF_FOUR: ("n_out_of_m_prune_algo", "l1_selective_prune"),
}


@dataclass(frozen=True)
class ChannelPlan:
    """What channel pruning does to one layer.

    Attributes:
        ratio: share of its output channels that goes, 0 < ratio < 1.
        ascend_optimized: whether the number kept is rounded up to a multiple of 16.
    """

    ratio: float
    ascend_optimized: bool = True


@dataclass(frozen=True)
class TwoOfFourPlan:
    """What 2:4 sparsity does to one layer.

    Attributes:
        update_freq: batches between two selections; 0: only one, at the first batch.
    """

    update_freq: int = 0


Plan = ChannelPlan | TwoOfFourPlan


@dataclass(frozen=True)
class PruneConfig:
    """The sparsity that a .cfg asks for.

    Attributes:
        kind: `CHANNELS` or `TWO_OF_FOUR`; all plans are of that kind.
        plans: what is done to each layer, by name, in the model's module order.
        left: why each other layer of a type in `KINDS[kind]` is left alone, by name.
    """

    kind: str
    plans: dict[str, Plan]
    left: dict[str, str]


def prune_config_from_cfg(
    message: AMCTRetrainConfig,
    layers: Sequence[SeenLayer],
    module_names: Collection[str],
    place: str,
) -> PruneConfig | None:
    """What the sparsity part of a .cfg means for a model.

    For each layer the override by its name counts, else the one by its type, else the global
    `prune_config`; blocks are not mixed. Layers in `skip_layers`, `regular_prune_skip_layers` or
    of a type in `skip_layer_types`, `regular_prune_skip_types` are left alone.

    Args:
        message: what `parse_retrain_cfg` returned.
        layers: what a look at the model found, with the reason why a layer cannot be pruned.
        module_names: names of all modules of the model.
        place: the file's name, for messages.

    Returns:
        None where the file has no global `prune_config`: it asks for no sparsity. Overrides
        that ask for some are then named in the log.

    Raises:
        ConfigError: all of them in one error (up to ten): only overrides and no global block of
            any feature, both kinds of sparsity, a block without an algorithm, a ratio outside
            (0, 1), names of layers or types that do not exist or are there twice, overrides of
            layers that cannot be pruned.
    """
    problems = ProblemList(place, ConfigError)
    asking = [
        *(f"override_layer_types[{e.layer_type}]" for e in _asking(message.override_layer_types)),
        *(
            f"override_layer_configs[{e.layer_name}]"
            for e in _asking(message.override_layer_configs)
        ),
    ]
    if not message.HasField("prune_config"):
        if asking and not quantizes(message):
            raise ConfigError(
                f"{place}: {asking[0]}.prune_config is an override, and there is no global "
                "prune_config: overrides alone do not switch pruning on; give a prune_config too"
            )
        for here in asking:
            logger.warning(
                "%s: %s.prune_config has no effect without a global prune_config", place, here
            )
        return None
    kind = message.prune_config.WhichOneof("regular_prune_strategy")

    def read(entry: Any, where: str) -> Plan | None:
        return _plan(entry.prune_config, f"{where}.prune_config", kind, problems)

    common = _plan(message.prune_config, "prune_config", kind, problems)
    if kind is None:
        problems.raise_if_any()
    # Any layer may be skipped; the lists serve quantization too.
    skips: Overrides[None] = Overrides(None, layers, module_names, problems, done="pruned")
    skips.skip_layers(message.skip_layers, "skip_layers")
    skips.skip_types(message.skip_layer_types, "skip_layer_types")
    skips.skip_layers(message.regular_prune_skip_layers, "regular_prune_skip_layers")
    skips.skip_types(message.regular_prune_skip_types, "regular_prune_skip_types")
    for entry in message.override_layer_configs:
        if not entry.HasField("prune_config"):
            skips.check_name(entry.layer_name, f"override_layer_configs[{entry.layer_name}]")
    able = [layer for layer in layers if layer.kind in KINDS[kind]]
    asked: Overrides[Plan | None] = Overrides(
        common, able, module_names, problems, KINDS[kind], "pruned"
    )
    asked.add_types(_asking(message.override_layer_types), "override_layer_types", read)
    asked.add_layers(_asking(message.override_layer_configs), "override_layer_configs", read)
    problems.raise_if_any()
    plans: dict[str, Plan] = {}
    left: dict[str, str] = {}
    for layer in able:
        plan = asked.block(layer)
        if skips.skipped(layer):
            left[layer.name] = "the config skips it"
        elif layer.reason is not None:
            left[layer.name] = layer.reason
        elif plan is not None:
            plans[layer.name] = plan
    return PruneConfig(kind, plans, left)


def quantizes(message: AMCTRetrainConfig) -> bool:
    """Whether the file switches quantization-aware training on."""
    blocks = ("retrain_data_quant_config", "retrain_weight_quant_config")
    return any(message.HasField(block) for block in blocks)


def _asking(entries: Any) -> list[Any]:
    """The overrides that say something about sparsity."""
    return [entry for entry in entries if entry.HasField("prune_config")]


def _plan(block: Any, place: str, kind: str | None, problems: ProblemList) -> Plan | None:
    """The plan in a PruneConfig message; None where a problem was added."""
    own = block.WhichOneof("regular_prune_strategy")
    if own is None:
        problems.add(f"{place} names no kind of sparsity; allowed: {' or '.join(KINDS)}")
        return None
    if kind is not None and own != kind:
        problems.add(
            f"{place} asks for {own} and prune_config for {kind}; allowed: one kind in a file"
        )
        return None
    pruner = getattr(block, own)
    choice, algorithm = _ALGORITHMS[own]
    if pruner.WhichOneof(choice) is None:
        problems.add(f"{place}.{own} names no algorithm; allowed: {algorithm}")
        return None
    if own == TWO_OF_FOUR:
        return TwoOfFourPlan(pruner.l1_selective_prune.update_freq)
    params = pruner.balanced_l2_norm_filter_prune
    ratio = shortest(params.prune_ratio)
    if not 0 < ratio < 1:
        problems.add(
            f"{place}.{own}.{algorithm}.prune_ratio is {ratio}; allowed: a number in (0, 1)"
        )
        return None
    return ChannelPlan(ratio, params.ascend_optimized)
