"""Search for the share of each layer's channels to prune: auto_channel_prune_search."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from amct_pytorch.auto_channel_prune.greedy import GreedySearch, largest_ratio
from amct_pytorch.auto_channel_prune.plans import lost_channels, plan_of
from amct_pytorch.auto_channel_prune.search_channel import SearchChannelBase
from amct_pytorch.auto_channel_prune.search_data import SearchData
from amct_pytorch.auto_channel_prune.search_graph import (
    SearchGraph,
    bit_operations,
    graph_info,
    search_records,
)
from amct_pytorch.auto_channel_prune.sensitivity import SensitivityBase, TaylorLossSensitivity
from amct_pytorch.config.prune_cfg import (
    ChannelPlan,
    PruneConfig,
    prune_config_from_cfg,
)
from amct_pytorch.config.prune_search_cfg import (
    SearchConfig,
    cfg_text,
    exact_ratio,
    read_search_cfg,
    with_plans,
)
from amct_pytorch.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    ConfigError,
    did_you_mean,
    shown,
)
from amct_pytorch.files import PathLike, WholeFiles, check_distinct, check_writable
from amct_pytorch.flows.arguments import public_call
from amct_pytorch.flows.channel_pruning import (
    ByConfig,
    PrunedChannels,
    asked_of,
    channel_graph,
    channel_layers,
    prune_channels,
)
from amct_pytorch.graph.coupling.graph import ChannelGraph
from amct_pytorch.graph.coupling.groups import Group
from amct_pytorch.graph.coupling.removal import positions_of
from amct_pytorch.graph.look import ModelGraph, copy_model, look_at
from amct_pytorch.graph.tensors import ModelInputs
from amct_pytorch.graph.trace import Trace
from amct_pytorch.logs import logger, start_logging
from amct_pytorch.proto import AMCTRetrainConfig, PruneRecord
from amct_pytorch.record.attributes import attribute
from amct_pytorch.report.channel_search import SearchedLayer, SearchLedger
from amct_pytorch.report.decomposition import ledger_beside
from amct_pytorch.report.layer_facts import traced_network

SENSITIVITIES: dict[str, type[SensitivityBase]] = {"TaylorLossSensitivity": TaylorLossSensitivity}
SEARCHES: dict[str, type[SearchChannelBase]] = {"GreedySearch": GreedySearch}
# A ratio to find out with what can be followed once channels go.
TRIAL = ChannelPlan(0.5, False)


@public_call
def auto_channel_prune_search(
    model: nn.Module,
    config: PathLike,
    input_data: Sequence[Any],
    output_cfg: PathLike,
    sensitivity: str | SensitivityBase = "TaylorLossSensitivity",
    search_alg: str | SearchChannelBase = "GreedySearch",
) -> None:
    """Searches the share of each layer's channels to prune, for a given compression.

    Channels are rated by what the loss suffers when they go, and by the bit complexity (FLOPs ×
    bits of weights × bits of inputs) that goes with them; those worth least are given up, over
    all layers, until original over pruned complexity is `compress_ratio`. The numbers found are
    written as a ``.cfg`` for `create_prune_retrain_model`, and what was found for each layer as
    ``<output_cfg>_ledger.json`` beside it (``net.cfg``: ``net_ledger.json``).

    Args:
        model: with its weights, on any device; left untouched.
        config: protobuf-text ``.cfg`` (message AutoChannelPruneConfig).
        input_data: ``[data, label]``, of which iteration i uses sample i, or a list of pairs
            ``[[data, label], …]``; at least `test_iteration` of them. A label has the shape of
            the model's output. The model is run on the first of them to see its channels.
        output_cfg: ``.cfg`` to write.
        sensitivity: ``TaylorLossSensitivity``, or an instance of a subclass of
            `SensitivityBase`.
        search_alg: ``GreedySearch``, or an instance of a subclass of `SearchChannelBase`.

    Raises:
        AmctError: naming the argument, file or layer, what was found and what is allowed (for
            `compress_ratio`: the largest that can be reached); nothing is written then.
    """
    start_logging(to_file=False)
    began = time.perf_counter()
    rates: SensitivityBase = _plugin(sensitivity, SensitivityBase, SENSITIVITIES, "sensitivity")
    searches: SearchChannelBase = _plugin(search_alg, SearchChannelBase, SEARCHES, "search_alg")
    asked = read_search_cfg(config)
    check_distinct(config=config, output_cfg=output_cfg)
    target = check_writable(output_cfg, "output_cfg")
    check_writable(ledger_beside(target), "output_cfg")
    data = SearchData.of(input_data, asked.test_iteration)
    inputs = data.inputs()
    graph = look_at(model, inputs)
    data.check_labels(copy_model(model))
    start_logging(to_file=True)
    network = _Network(model, inputs, graph, asked, str(config))
    channels = network.followed()
    seconds = {"look and follow": time.perf_counter() - began}
    while True:
        found = _search(network, channels, rates, searches, input_data, seconds)
        # The .cfg itself, taken as create_prune_retrain_model takes it.
        pruned = network.pruned(found.message, channels)
        if pruned.graph is channels:
            break
        channels = pruned.graph
    reached = network.bitops(network.channels.flow.trace) / network.bitops(pruned.trace)
    _tell(asked.compress_ratio, reached)
    seconds["all"] = time.perf_counter() - began
    ledger = SearchLedger(
        (asked.compress_ratio, reached),
        found.largest,
        network.ledger_of(found, pruned),
        type(rates).__name__,
        type(searches).__name__,
        seconds,
        network=traced_network(graph),
    )
    comments = [
        f"compress_ratio {asked.compress_ratio:g} asked for, {reached:.4g} reached",
        f"{type(rates).__name__}, {type(searches).__name__}",
    ]
    with WholeFiles() as files:
        files.write(target, cfg_text(found.message, comments).encode(), what="output_cfg")
        files.write(ledger_beside(target), ledger.to_json().encode(), what="output_cfg")


def _plugin(given: Any, base: type, known: Mapping[str, type], what: str) -> Any:
    """The instance that an argument stands for."""
    if isinstance(given, base):
        return given
    allowed = f"allowed: {', '.join(map(repr, known))}, or an instance of a {base.__name__}"
    if isinstance(given, str):
        if given in known:
            return known[given]()
        raise ArgumentValueError(f"{what} is {given!r}; {allowed}{did_you_mean(given, known)}")
    raise ArgumentTypeError(f"{what} is {shown(given)}; {allowed}")


def _tell(asked: float, reached: float) -> None:
    if reached < asked * (1 - 1e-6):
        logger.warning(
            "the search reached compress_ratio %.4g, less than the %.4g asked for", reached, asked
        )
    else:
        logger.info("compress_ratio %.4g asked for, %.4g reached", asked, reached)


@dataclass(frozen=True)
class _Found:
    """What one search found.

    Attributes:
        message: of the .cfg.
        searched: groups that were searched, by index.
        fixed: names of layers whose ratio override_prune_cfg fixes.
        records: of the groups that were searched.
        largest: compress_ratio that could have been reached.
    """

    message: AMCTRetrainConfig
    searched: frozenset[int]
    fixed: frozenset[str]
    records: list[PruneRecord]
    largest: float


class _Network:
    """The user's network, and what the search may do to it."""

    def __init__(
        self,
        model: nn.Module,
        inputs: ModelInputs,
        graph: ModelGraph,
        asked: SearchConfig,
        config: str,
    ) -> None:
        self.model = model
        self.inputs = inputs
        self.graph = graph
        self.asked = asked
        self.config = config
        self.channels = channel_graph(model, inputs, graph)
        # Refuses an override file that does not fit before anything else is done.
        self.plans(with_plans(asked.override, TRIAL, {}, []), self.channels)

    def plans(self, message: AMCTRetrainConfig, channels: ChannelGraph) -> PruneConfig:
        """What a message means for the network."""
        place = self.asked.override_file or self.config
        layers = channel_layers(self.graph, channels)
        config = prune_config_from_cfg(message, layers, self.graph.module_names, place)
        assert config is not None
        return config

    def followed(self) -> ChannelGraph:
        """The channels, after what does not work with fewer of them has shown itself."""
        message = with_plans(self.asked.override, TRIAL, {}, [])
        return self.pruned(message, self.channels).graph

    def pruned(self, message: AMCTRetrainConfig, channels: ChannelGraph) -> PrunedChannels:
        """The network as a .cfg prunes it."""
        # Held against the graph that create_prune_retrain_model begins with.
        config = self.plans(message, self.channels)
        return prune_channels(self.model, self.inputs, channels, ByConfig(self.model, config))

    def bitops(self, trace: Trace) -> int:
        """Bit complexity of all layers of a run."""
        return sum(bit_operations(self.model, trace).values())

    def fixed_names(self) -> frozenset[str]:
        """The layers that override_prune_cfg names, or whose type it names."""
        override = self.asked.override
        names = {
            e.layer_name for e in override.override_layer_configs if e.HasField("prune_config")
        }
        kinds = {e.layer_type for e in override.override_layer_types if e.HasField("prune_config")}
        return frozenset(
            layer.name for layer in self.graph.layers if layer.name in names or layer.kind in kinds
        )

    def ledger_of(self, found: _Found, pruned: PrunedChannels) -> list[SearchedLayer]:
        """What became of each layer."""
        before = graph_info(self.model, self.channels.flow.trace, self.model)
        after = graph_info(pruned.model, pruned.trace, self.model)
        config = self.plans(found.message, self.channels)
        sums = _sensitivity_sums(found.records, pruned)
        entries = []
        for name, info in before.items():
            group = pruned.graph.group_of(name)
            status, reason = "left", None
            if name in found.fixed:
                status = "fixed"
            elif group is not None and group.index in found.searched:
                status = "searched"
            else:
                reason = pruned.graph.why_whole(name)
                if reason is None and group is not None:
                    reason = asked_of(group, config)[0]
            entries.append(
                SearchedLayer(
                    name,
                    status,
                    reason,
                    (info["cout"], after[name]["cout"]),
                    (info["bitops"], after[name]["bitops"]),
                    sums.get(name),
                )
            )
        return entries


def _sensitivity_sums(
    records: list[PruneRecord], pruned: PrunedChannels
) -> dict[str, tuple[float, float]]:
    """Of each layer that was searched: the sensitivity that stays and that goes."""
    sums = {}
    for record in records:
        for node in record.producer:
            group = pruned.graph.group_of(node.name)
            assert group is not None
            values = np.array(attribute(node, "sensitivity"))
            gone = pruned.gone.get(group.index, np.zeros(len(group), dtype=bool))
            own = gone[positions_of(pruned.graph, node.name)]
            sums[node.name] = (float(values[~own].sum()), float(values[own].sum()))
    return sums


def _search(
    network: _Network,
    channels: ChannelGraph,
    rates: SensitivityBase,
    searches: SearchChannelBase,
    input_data: Sequence[Any],
    seconds: dict[str, float],
) -> _Found:
    """One search, for channels as they are known to be followed."""
    asked = network.asked
    base = with_plans(asked.override, TRIAL, {}, [])
    config = network.plans(base, network.channels)
    fixed_names = network.fixed_names()
    able = [group for group in channels.groups if asked_of(group, config)[1] is not None]
    fixed = [group for group in able if fixed_names & set(group.names)]
    searched = [group for group in able if not fixed_names & set(group.names)]
    plans = {
        name: plan
        for group in fixed
        for plan in [_least(config, [n for n in group.names if n in fixed_names])]
        for name in _nameable(group, config)
        if name not in fixed_names
    }
    settled = network.pruned(
        with_plans(
            asked.override,
            TRIAL,
            plans,
            [name for group in searched for name in _nameable(group, config)],
        ),
        channels,
    )
    info = graph_info(settled.model, settled.trace, network.model)
    records = search_records(channels, searched)
    whole, now = network.bitops(network.channels.flow.trace), network.bitops(settled.trace)
    possible = largest_ratio(info, records, asked.ascend_optimized, asked.max_prune_ratio)
    largest = possible * whole / now
    _check_ratio(asked, largest, network.config)
    began = time.perf_counter()
    copied = copy_model(network.model)
    rates.setup_initialization(
        (SearchGraph(copied, channels), info), input_data, asked.test_iteration
    )
    rates.get_sensitivity(records)
    seconds["sensitivity"] = time.perf_counter() - began
    began = time.perf_counter()
    ratio = asked.compress_ratio * now / whole
    masks: dict[str, list[int]] = {}
    if ratio > 1:
        masks = searches.channel_prune_search(
            info, records, (ratio, asked.ascend_optimized, asked.max_prune_ratio)
        )
    lost = lost_channels(masks, channels, searched, type(searches).__name__)
    seconds["search"] = time.perf_counter() - began
    skipped = []
    for group in searched:
        names = _nameable(group, config)
        plan = plan_of(group, lost, asked.ascend_optimized, channels)
        if plan is None:
            skipped += names
        else:
            plans.update(dict.fromkeys(names, plan))
    share = exact_ratio(1, 2)
    message = with_plans(asked.override, ChannelPlan(share, asked.ascend_optimized), plans, skipped)
    return _Found(
        message, frozenset(group.index for group in searched), fixed_names, records, largest
    )


def _check_ratio(asked: SearchConfig, largest: float, place: str) -> None:
    can = (
        f"the largest that can be reached is {largest:.4g} (max_prune_ratio "
        f"{asked.max_prune_ratio:g}, ascend_optimized {str(asked.ascend_optimized).lower()})"
    )
    if asked.compress_ratio <= 1:
        raise ConfigError(
            f"{place}: compress_ratio is {asked.compress_ratio:g}; allowed: a number > 1; {can}"
        )
    if asked.compress_ratio > largest * (1 + 1e-9):
        raise ConfigError(f"{place}: compress_ratio is {asked.compress_ratio:g}; {can}")


def _least(config: PruneConfig, names: Sequence[str]) -> ChannelPlan:
    plans = [plan for name in names if isinstance(plan := config.plans.get(name), ChannelPlan)]
    return min(plans, key=lambda plan: plan.ratio)


def _nameable(group: Group, config: PruneConfig) -> list[str]:
    """The layers of a group that a .cfg may name."""
    return [name for name in group.names if name in config.plans]
