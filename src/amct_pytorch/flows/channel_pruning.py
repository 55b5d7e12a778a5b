"""Channel pruning of a whole model: what goes by the config or a record, and its ledger."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from amct_pytorch.algorithms.balanced_l2_norm import balanced_l2_norm
from amct_pytorch.algorithms.channel_choice import Choice, choose
from amct_pytorch.config.prune_cfg import CHANNELS, KINDS, ChannelPlan, PruneConfig
from amct_pytorch.errors import ModelError
from amct_pytorch.graph.costs import layer_macs
from amct_pytorch.graph.coupling.branches import trace_of_more
from amct_pytorch.graph.coupling.graph import ChannelGraph
from amct_pytorch.graph.coupling.groups import Group
from amct_pytorch.graph.coupling.removal import Gone
from amct_pytorch.graph.coupling.verify import verify
from amct_pytorch.graph.layers import SeenLayer
from amct_pytorch.graph.look import ModelGraph, copy_sharing_weights
from amct_pytorch.graph.tensors import ModelInputs, in_own_precision, random_state_kept
from amct_pytorch.graph.trace import Trace
from amct_pytorch.logs import logger
from amct_pytorch.nn.cut_channels import cut_channels
from amct_pytorch.report.pruning import GroupEntry, PrunedLayer, PruningLedger

# Attribute of a pruned model: its ledger as JSON. Copies and pickles keep it.
LEDGER = "amct_pruning_ledger"
# Forwards of each model that are timed, and for how long at most.
ROUNDS = 3
SECONDS = 1.0


@dataclass(frozen=True)
class PrunedChannels:
    """A model with channels taken out.

    Attributes:
        model: a module of its own.
        graph: of the whole model; after calls that turned out to need all channels.
        gone: the channels that went, by group.
        trace: of the pruned model's run.
        seconds: wall time of each step.
    """

    model: nn.Module
    graph: ChannelGraph
    gone: Gone
    trace: Trace
    seconds: dict[str, float] = field(default_factory=dict)


def channel_graph(model: nn.Module, inputs: ModelInputs, graph: ModelGraph) -> ChannelGraph:
    """The channels of a model that a look has seen.

    Args:
        model: left as it is.
        inputs: what the look ran it on.
        graph: what the look found.
    """
    trace, training = trace_of_more(model, inputs, graph.trace)
    found = ChannelGraph.of(model, trace, training)
    for name in found.idle:
        logger.warning(
            "%s did not run on input_data and stays as it is; if other inputs reach it, give such "
            "input_data",
            name,
        )
    return found


def channel_layers(graph: ModelGraph, channels: ChannelGraph) -> list[SeenLayer]:
    """The layers of a look, with the reason why their own channels cannot go as theirs."""
    return [
        replace(layer, reason=channels.why_whole(layer.name))
        if layer.kind in KINDS[CHANNELS]
        else layer
        for layer in graph.layers
    ]


def prune_channels(
    model: nn.Module,
    inputs: ModelInputs,
    graph: ChannelGraph,
    choice: Callable[[ChannelGraph], Gone],
) -> PrunedChannels:
    """Takes channels out and runs what is left, to see that it works as the graph says.

    Where a call does not (a size written into the forward, say), what goes into it is left whole
    and channels are chosen anew.

    Args:
        model: left as it is.
        inputs: what the graph's run was on.
        graph: the model's channels.
        choice: the channels that go, for a graph.

    Raises:
        ModelError: it does not work whatever is left whole.
    """
    seconds = {"choose": 0.0, "cut": 0.0, "verify": 0.0}
    for _ in range(len(graph.flow.trace.ops) + 1):
        began = time.perf_counter()
        gone = choice(graph)
        alive = graph.alive(gone)
        chosen = time.perf_counter()
        pruned = cut_channels(model, graph.flow.slots, alive)
        cut = time.perf_counter()
        trace, broken = verify(graph.flow, alive, pruned, inputs, graph.training)
        seconds["choose"] += chosen - began
        seconds["cut"] += cut - chosen
        seconds["verify"] += time.perf_counter() - cut
        if broken is None:
            return PrunedChannels(pruned, graph, gone, trace, seconds)
        logger.info("%s; what goes into it is looked at again", broken.reason)
        graph = graph.without(broken.call, broken.reason)
    raise ModelError("the model does not run with fewer channels")


class ByConfig:
    """The channels that a config takes out.

    Args:
        model: whose weights say which.
        config: what is asked for.

    Attributes:
        ratios: what was asked of each group, by its index, of the last graph asked for.
        choices: what was decided, likewise.
    """

    def __init__(self, model: nn.Module, config: PruneConfig) -> None:
        self._tensors = dict([*model.named_parameters(), *model.named_buffers()])
        self._config = config
        self.ratios: dict[int, float] = {}
        self.choices: dict[int, Choice] = {}

    def __call__(self, graph: ChannelGraph) -> Gone:
        """The channels of each group that go."""
        self.ratios, self.choices = {}, {}
        for group in graph.groups:
            reason, plan = asked_of(group, self._config)
            if plan is None:
                self.choices[group.index] = Choice(np.zeros(len(group), dtype=bool), (reason,))
                continue
            self.ratios[group.index] = plan.ratio
            scores = balanced_l2_norm(group, self._tensors)
            self.choices[group.index] = choose(
                group,
                scores,
                plan.ratio,
                plan.ascend_optimized,
                graph.flow.sets,
                graph.flow.blocks,
            )
        return {index: choice.gone for index, choice in self.choices.items() if choice.gone.any()}


def asked_of(group: Group, config: PruneConfig) -> tuple[str, ChannelPlan | None]:
    """What a config asks of a group: the least of its layers' ratios; or why nothing is."""
    if group.reason is not None:
        return group.reason, None
    plans = []
    for name in group.names:
        plan = config.plans.get(name)
        if isinstance(plan, ChannelPlan):
            plans.append(plan)
        elif name in config.left:
            alone = len(group.names) == 1
            reason = config.left[name]
            return reason if alone else f"{name} is one of them: {reason}", None
    if not plans:
        kinds = " and ".join(KINDS[CHANNELS])
        return f"of themselves only the channels of {kinds} layers are pruned", None
    ratio = min(plan.ratio for plan in plans)
    return "", ChannelPlan(ratio, any(plan.ascend_optimized for plan in plans))


def pruning_ledger(
    model: nn.Module,
    pruned: PrunedChannels,
    inputs: ModelInputs,
    asked: ByConfig | None = None,
    seconds: Mapping[str, float] | None = None,
) -> PruningLedger:
    """What pruning did to a model.

    Args:
        model: before.
        pruned: after.
        inputs: to run both on.
        asked: the config's choice; None for a record's.
        seconds: wall time of what went before.
    """
    began = time.perf_counter()
    milliseconds = _times(model, pruned.model, inputs)
    taken = {**(seconds or {}), **pruned.seconds, "latency": time.perf_counter() - began}
    graph = pruned.graph
    groups = []
    for group in graph.groups:
        gone = pruned.gone.get(group.index)
        lost = 0 if gone is None else int(gone.sum())
        choice = None if asked is None else asked.choices.get(group.index)
        notes = list(choice.notes) if choice else []
        reason = None
        if not lost:
            reason = group.reason or ("; ".join(notes) or "nothing was asked for")
            notes = []
        groups.append(
            GroupEntry(
                group.names,
                group.followers,
                len(group),
                len(group) - lost,
                None if asked is None else asked.ratios.get(group.index),
                reason,
                notes,
            )
        )
    reasons = {name: entry.reason for entry in groups for name in entry.producers}
    before, after = layer_macs(graph.flow.trace), layer_macs(pruned.trace)
    layers = [
        _layer(name, module, pruned.model.get_submodule(name), before, after, graph, reasons)
        for name, module in model.named_modules()
        if name in before
    ]
    return PruningLedger(
        groups,
        layers,
        (_parameters(model), _parameters(pruned.model)),
        (2 * sum(before.values()), 2 * sum(after.values())),
        milliseconds,
        [*graph.unfollowed, *(f"{name} did not run on input_data" for name in graph.idle)],
        taken,
    )


def _layer(
    name: str,
    was: nn.Module,
    now: nn.Module,
    before: Mapping[str, int],
    after: Mapping[str, int],
    graph: ChannelGraph,
    reasons: Mapping[str, str | None],
) -> PrunedLayer:
    channels = (_out_channels(was), _out_channels(now))
    parameters = (_parameters(was), _parameters(now))
    status = "whole"
    if channels[1] < channels[0]:
        status = "pruned" if name in reasons else "followed"
    elif parameters[1] < parameters[0]:
        status = "followed"
    reason = None
    if channels[1] == channels[0]:
        reason = reasons.get(name) or graph.why_whole(name)
    flops = (2 * before[name], 2 * after.get(name, 0))
    return PrunedLayer(name, type(was).__name__, status, reason, channels, parameters, flops)


def _out_channels(module: nn.Module) -> int:
    return int(getattr(module, "out_channels", getattr(module, "out_features", 0)))


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _times(before: nn.Module, after: nn.Module, inputs: ModelInputs) -> tuple[float, float] | None:
    """Milliseconds of one forward of each, taking turns; the least of a few counts."""
    if not ROUNDS:
        return None
    models = [copy_sharing_weights(model).eval() for model in (before, after)]
    best = [float("inf"), float("inf")]
    began = time.perf_counter()
    for _ in range(ROUNDS):
        for i, model in enumerate(models):
            with in_own_precision(model), random_state_kept(model):
                own = inputs.copied()
                _wait(model)
                started = time.perf_counter()
                own.call(model)
                _wait(model)
            best[i] = min(best[i], time.perf_counter() - started)
        if time.perf_counter() - began > SECONDS:
            break
    return best[0] * 1e3, best[1] * 1e3


def _wait(model: nn.Module) -> None:
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        torch.accelerator.synchronize()


def kept_ledger(model: nn.Module) -> PruningLedger | None:
    """The ledger that a pruned model carries; None for another model."""
    text = getattr(model, LEDGER, None)
    return None if text is None else PruningLedger.from_json(text)


def keep_ledger(model: nn.Module, ledger: PruningLedger) -> None:
    """Has a pruned model carry its ledger, and logs what was asked for and not done."""
    setattr(model, LEDGER, ledger.to_json())
    for group in ledger.groups:
        name = ", ".join(group.producers)
        if group.reason is not None and group.ratio is not None:
            logger.warning("%s: nothing was pruned: %s", name, group.reason)
        elif group.reason is not None:
            logger.info("%s: left whole: %s", name, group.reason)
        for note in group.notes:
            logger.warning("%s: %d of %d channels kept: %s", name, group.kept, group.total, note)
    for text in ledger.unfollowed:
        logger.warning("channels could not be followed: %s", text)
    logger.info("channels pruned: %s", ledger.summary())
