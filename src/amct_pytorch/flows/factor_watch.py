"""Watching a model's forward passes while layers with input factors calibrate."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import nn

from amct_pytorch.graph.tensors import ModelInputs
from amct_pytorch.graph.trace import Recorder
from amct_pytorch.low_bit.balanced import BalancedLinear
from amct_pytorch.low_bit.factor_places import FactorPlaces
from amct_pytorch.nn.forward_patches import StopForward


class FactorWatch:
    """Stands in for a model's forward until all of its layers are calibrated.

    Each pass is written down, so that it is known where the inputs of layers come from; behind
    the pass in which layers have seen their last batch they are solved. A pass that fails shows
    nothing.

    Args:
        model: its root.
        layers: those that calibrate, by name.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, BalancedLinear]) -> None:
        self._model = model
        self._layers = dict(layers)
        self._own = model.__dict__.get("forward")
        self._forward = model.forward
        self._places = FactorPlaces()
        self._running = False
        # The signature that callers look up is that of the model's forward.
        functools.update_wrapper(self, model.forward)
        model.__dict__["forward"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, watched."""
        if self._running or not self._layers:
            return self._forward(*args, **kwargs)
        recorder = Recorder(self._model)
        recorder.name_inputs(ModelInputs(args, kwargs))
        self._running = True
        for layer in self._layers.values():
            layer.watcher = recorder
        try:
            with recorder:
                output = self._forward(*args, **kwargs)
            recorder.name_outputs(output)
            self._places.learn(recorder.trace)
        except StopForward as stop:
            recorder.name_outputs(stop.args)
            self._places.learn(recorder.trace)
            raise
        finally:
            self._running = False
            for layer in self._layers.values():
                layer.watcher = None
            self._settle()
        return output

    def _settle(self) -> None:
        """Solves what waits; leaves the model when nothing is left to calibrate."""
        self._places.settle(self._model, self._layers)
        if all(layer.ori_module is None for layer in self._layers.values()):
            self.remove()

    def remove(self) -> None:
        """The model's forward is its own again."""
        self._layers = {}
        if self._model.__dict__.get("forward") is not self:
            return  # something else has been put around it: it goes on as a mere passage
        if self._own is None:
            del self._model.__dict__["forward"]
        else:
            self._model.__dict__["forward"] = self._own


def watch_factors(model: nn.Module) -> None:
    """Watches a model that `quantize` has changed, if layers of it have input factors."""
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, BalancedLinear)
    }
    if layers:
        FactorWatch(model, layers)


def unwatch_factors(model: nn.Module) -> None:
    """Takes back `watch_factors` in a model and whatever contains or is part of it."""
    for module in model.modules():
        watch = module.__dict__.get("forward")
        if isinstance(watch, FactorWatch):
            watch.remove()
