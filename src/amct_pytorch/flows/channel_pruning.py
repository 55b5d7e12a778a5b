"""Taking channels out of a model, and making sure that what is left works."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from amct_pytorch.errors import ModelError
from amct_pytorch.graph.coupling.graph import ChannelGraph
from amct_pytorch.graph.coupling.verify import verify
from amct_pytorch.graph.tensors import ModelInputs
from amct_pytorch.logs import logger
from amct_pytorch.nn.cut_channels import cut_channels

# The channels of each group that go, by the group's index.
Gone = Mapping[int, np.ndarray]


@dataclass(frozen=True)
class PrunedChannels:
    """A model with channels taken out.

    Attributes:
        model: a module of its own.
        graph: of the whole model; after calls that turned out to need all channels.
        gone: the channels that went, by group.
        seconds: wall time of each step.
    """

    model: nn.Module
    graph: ChannelGraph
    gone: Gone
    seconds: Mapping[str, float] = field(default_factory=dict)


def prune_channels(
    model: nn.Module,
    inputs: ModelInputs,
    graph: ChannelGraph,
    choose: Callable[[ChannelGraph], Gone],
) -> PrunedChannels:
    """Takes channels out and runs what is left, to see that it works as the graph says.

    Where a call does not (a size written into the forward, say), what goes into it is left whole
    and channels are chosen anew.

    Args:
        model: left as it is.
        inputs: what the graph's run was on.
        graph: the model's channels.
        choose: the channels that go, for a graph.

    Raises:
        ModelError: it does not work whatever is left whole.
    """
    seconds = {"choose": 0.0, "cut": 0.0, "verify": 0.0}
    for _ in range(len(graph.flow.trace.ops) + 1):
        began = time.perf_counter()
        gone = choose(graph)
        alive = graph.alive(gone)
        chosen = time.perf_counter()
        pruned = cut_channels(model, graph.flow.slots, alive)
        cut = time.perf_counter()
        broken = verify(graph.flow, alive, pruned, inputs, graph.training)
        seconds["choose"] += chosen - began
        seconds["cut"] += cut - chosen
        seconds["verify"] += time.perf_counter() - cut
        if broken is None:
            return PrunedChannels(pruned, graph, gone, seconds)
        logger.info("%s; what goes into it is looked at again", broken.reason)
        graph = graph.without(broken.call, broken.reason)
    raise ModelError("the model does not run with fewer channels")
