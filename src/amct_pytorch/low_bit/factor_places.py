"""Moving the factors of `BalancedLinear` layers into what makes their inputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from amct_pytorch.graph.input_sources import InputSource, input_sources
from amct_pytorch.graph.trace import Trace
from amct_pytorch.logs import logger
from amct_pytorch.low_bit.balanced import BalancedLinear, TiedChannels

Layers = Mapping[str, BalancedLinear]


class FactorPlaces:
    """What calibration passes have shown of where layers' inputs come from.

    Factors are moved only where every pass has shown the same.
    """

    def __init__(self) -> None:
        self._sources: dict[str, InputSource] = {}

    def learn(self, trace: Trace) -> None:
        """Takes in one pass through the model."""
        for source in input_sources(trace):
            for reader in source.readers:
                known = self._sources.setdefault(reader, source)
                if known != source and known.reason is None:
                    why = source.reason or "its input is not always made by the same"
                    self._sources[reader] = InputSource((reader,), reason=why)

    def settle(self, model: nn.Module, layers: Layers) -> None:
        """Solves the layers that wait, those that share an input together.

        Args:
            model: has the layers and the parameters by the names of the passes.
            layers: all that are being calibrated, by name.
        """
        groups: dict[int, dict[str, BalancedLinear]] = {}
        for name, layer in layers.items():
            if layer.waits:
                groups.setdefault(id(layer.statistics), {})[name] = layer
        waiting = {name: layer for group in groups.values() for name, layer in group.items()}
        done: set[int] = set()

        def settle(group: dict[str, BalancedLinear]) -> None:
            if id(group) in done:
                return
            done.add(id(group))
            # What divides a layer's output must be known before the layer is quantized.
            for behind in groups.values():
                source = self._source(behind)
                if source.layer in group and source.layer is not None:
                    settle(behind)
            self._settle_group(model, group, waiting)

        with torch.no_grad():
            for group in groups.values():
                settle(group)

    def _source(self, group: Layers) -> InputSource:
        """Where the input of a group comes from, if all passes agree."""
        names = tuple(sorted(group))
        found = self._sources.get(names[0])
        if found is None:
            return InputSource(names, reason="no whole pass through the model was seen")
        if found.reason is None and found.readers != names:
            others = sorted(set(found.readers) ^ set(names))
            return InputSource(names, reason=f"{others[0]} reads its input too, and is apart")
        return found

    def _settle_group(self, model: nn.Module, group: Layers, waiting: Layers) -> None:
        members = list(group.values())
        source = self._source(group)
        reason = source.reason or _hindrance(model, source, waiting)
        tied = TiedChannels()
        if reason is None and source.channels is not None:
            tied = TiedChannels(torch.tensor(source.channels))
        balance = type(members[0]).choose(members, tied)
        moved: Tensor | None = None
        notes: tuple[str, ...] = ()
        if balance.factors is not None:
            if reason is None:
                moved = _move(model, source, balance.factors, waiting)
                place = source.layer or ", ".join(source.parameters)
                notes = (f"factors moved into {place}",)
            else:
                notes = (f"factors stay at its input: {reason}",)
        for name, layer in group.items():
            others = [other for other in group if other != name]
            shared = (f"factors shared with {', '.join(others)}",) if others else ()
            layer.settle(balance, moved, (*shared, *notes) if balance.factors is not None else ())
        logger.debug("%s: %s", ", ".join(group), "; ".join(notes))


def _hindrance(model: nn.Module, source: InputSource, waiting: Layers) -> str | None:
    """Why factors cannot be moved to a source after all; None if they can."""
    if source.layer is not None:
        layer = waiting.get(source.layer)
        if layer is None:
            return f"{source.layer} is quantized already, or not calibrated yet"
        if layer.request.weights.strategy == "tensor":
            return f"one scale for all of {source.layer} would have to hold them"
        return None
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in source.parameters:
        own = parameters.get(name)
        if own is None:
            return f"{name} is no parameter"
        if len(names[id(own)]) > 1:
            return f"{name} is {' and '.join(names[id(own)])}"
    weight = parameters[source.parameters[0]]
    if source.rows and weight.dtype != torch.float32:
        return f"{source.parameters[0]} is {weight.dtype} and would be rounded again"
    return None


def _move(model: nn.Module, source: InputSource, factors: Tensor, waiting: Layers) -> Tensor:
    """Divides the source by factors [K]; gives the factors that it has been divided by exactly."""
    made = factors
    if source.layer is not None:
        layer = waiting[source.layer]
        size = layer.out_features
    else:
        weight = model.get_parameter(source.parameters[0])
        size = len(weight) if source.rows else weight.numel()
    index = None
    if source.channels is not None:
        index = torch.tensor(source.channels, device=factors.device)
        made = factors.new_ones(size)
        made[index] = factors
    if source.layer is not None:
        before = layer.output_divisor
        layer.output_divisor = made if before is None else before * made
        return factors
    for number, name in enumerate(source.parameters):
        parameter = model.get_parameter(name)
        by = made.view(-1, 1) if source.rows and number == 0 else made.view(-1)
        by = by.to(parameter.device)
        exact = parameter.detach().float()
        divided = (exact.view(by.shape[0], -1) / by.view(by.shape[0], -1)).view(parameter.shape)
        divided = divided.to(parameter.dtype)
        if number == 0 and not source.rows:
            # A norm's weight in half precision is rounded: the layers take what is left of it.
            kept = exact.view(-1) / divided.float().view(-1)
            usable = kept.isfinite() & (kept > 0)
            made = torch.where(usable, kept.to(made.device), made)
        _assign(parameter, divided)
    return made if index is None else made[index]


def _assign(parameter: nn.Parameter, value: Tensor) -> None:
    """Changes a parameter in place, whatever mode it was made in."""
    mode = parameter.is_inference() or torch.is_inference_mode_enabled()
    with torch.inference_mode(mode), torch.no_grad():
        parameter.copy_(value)
