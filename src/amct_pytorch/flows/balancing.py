"""Balancing before post-training quantization: quantize_preprocess."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amct_pytorch.algorithms.balance import input_channel_maxima
from amct_pytorch.algorithms.smoothquant import smooth_factors
from amct_pytorch.config.calibration_json import load_calibration_json
from amct_pytorch.errors import CalibrationError, ConfigError
from amct_pytorch.files import PathLike, check_distinct, check_writable
from amct_pytorch.flows.arguments import public_call
from amct_pytorch.flows.preparation import InputData, fused_norms
from amct_pytorch.graph.layers import LAYER_KINDS
from amct_pytorch.graph.look import look_at
from amct_pytorch.graph.pairs import scalable_pairs
from amct_pytorch.graph.tensors import ModelInputs
from amct_pytorch.logs import logger, start_logging
from amct_pytorch.nn.equalize import equalize
from amct_pytorch.nn.instrument import instrument
from amct_pytorch.nn.intercept import LayerCall
from amct_pytorch.nn.simulate import without_autograd
from amct_pytorch.nn.wrapped import CompressedLayer, Stage, compressed_layers
from amct_pytorch.observers.channel_range import ChannelRange
from amct_pytorch.processes import gathered, in_one_process
from amct_pytorch.record.factors import LayerFactors
from amct_pytorch.record.record_file import RecordFile, read_record, write_record


@public_call
def quantize_preprocess(
    config_file: PathLike, record_file: PathLike, model: nn.Module, input_data: InputData
) -> nn.Module:
    """Prepares a copy of the model to balance its layers before quantization (DMQ).

    Each layer of the config that has `dmq_balancer_param` gets one factor for each input
    channel, s_j = max|x_j|^a / max|w_j|^(1-a) with a the param (arXiv 2211.10438, equation 4).
    Run one forward pass on the returned module, which gives the float result and writes the
    factors (`tensor_balance_factor`) to `record_file`; then call `quantize_model` with that
    record. After another pass the factors are those of both batches.

    Args:
        config_file: JSON written by `create_quant_config`.
        record_file: record to write; what an existing one holds beside these factors is kept.
        model: as given to `create_quant_config`; left untouched.
        input_data: as there.

    Returns:
        A module with the model's own interface.

    Raises:
        AmctError: naming the argument, file or layer, what was found and what is allowed; in
            the forward pass where a layer's input holds NaN or infinity.
    """
    start_logging(to_file=False)
    inputs = ModelInputs.of(input_data)
    check_distinct(config_file=config_file, record_file=record_file)
    record_path = check_writable(record_file, "record_file")
    graph = look_at(model, inputs)
    start_logging(to_file=True)
    config = load_calibration_json(config_file, graph.layers, graph.module_names)
    wanted = {
        name: layer.dmq_balancer_param
        for name, layer in config.enabled_layers().items()
        if layer.dmq_balancer_param is not None
    }
    if not wanted:
        raise ConfigError(
            f"{config_file}: no enabled layer has dmq_balancer_param, so nothing is to be "
            "balanced; ask for it in the .cfg (dmq_balancer) or in the JSON"
        )
    unweighted = [
        layer.name
        for layer in graph.layers
        if layer.name in wanted and not LAYER_KINDS[layer.kind].weighted
    ]
    for name in unweighted:
        logger.warning("%s has no weights to balance its input against; it stays as it is", name)
        del wanted[name]
    held = read_record(record_path) if record_path.exists() else RecordFile()
    fused = fused_norms(graph, config)
    names = list(wanted)
    if config.cross_layer_equalization:
        # Balanced is what quantize_model will find: the equalized layers.
        names = list(config.enabled_layers())
        pairs = scalable_pairs(graph, names, fused)
        equalized = functools.partial(equalize, pairs=pairs)
        prepared = instrument(model, graph, inputs, names, fused, rescale=equalized)
    else:
        fused = {name: norm for name, norm in fused.items() if name in wanted}
        prepared = instrument(model, graph, inputs, names, fused)
    _Balancing(prepared, wanted, held, record_path)
    return prepared


class _Balancing(Stage):
    """Watches the inputs of layers, and writes their factors after each pass."""

    def __init__(
        self,
        model: nn.Module,
        strengths: dict[str, float],
        held: RecordFile,
        record_path: Path,
    ) -> None:
        self._strengths = strengths
        self._held = held
        self._record_path = record_path
        self._layers = compressed_layers(model)
        self._seen: dict[str, ChannelRange] = {}
        self._passes = 0
        for layer in self._layers.values():
            layer.stage = self
        model.register_forward_hook(self._after)

    @without_autograd
    def run(self, layer: CompressedLayer, call: LayerCall) -> Tensor:
        """The float result."""
        if layer.name not in self._strengths:
            return layer.float_result(call)
        x = call.x.movedim(layer.kind.channel_axis, -1)
        seen = self._seen.setdefault(layer.name, ChannelRange(x.shape[-1], x.device))
        seen.add(x)
        if not bool(seen.magnitude.isfinite().all()):
            del self._seen[layer.name]
            raise CalibrationError(
                f"the input of layer {layer.name!r} holds NaN or infinity; check the data and the "
                "layers before this one"
            )
        return layer.float_result(call)

    def _after(self, _: nn.Module, __: Any, ___: Any) -> None:
        self._passes += 1
        if self._passes > 1:
            logger.warning(
                "balance factors are computed anew, from all %d batches so far", self._passes
            )
        with torch.inference_mode(False), torch.no_grad():
            seen = self._seen_by_all()
            for name, strength in self._strengths.items():
                if name in seen:
                    balance = _factors(self._layers[name], seen[name], strength)
                    known = self._held.factors.get(name, LayerFactors())
                    self._held.factors[name] = replace(known, balance=balance)
                else:
                    logger.warning("layer %r did not run; it has no balance factors", name)
        announce = self._passes == 1
        in_one_process(lambda: write_record(self._record_path, self._held, announce=announce), 0)

    def _seen_by_all(self) -> dict[str, ChannelRange]:
        """The ranges that all processes have seen together."""
        merged: dict[str, ChannelRange] = {}
        for seen in gathered(self._seen):
            for name, found in seen.items():
                if name in merged:
                    merged[name].merge(found)
                else:
                    merged[name] = found
        return merged


def _factors(layer: CompressedLayer, seen: ChannelRange, strength: float) -> tuple[float, ...]:
    assert layer.layout is not None
    weights = input_channel_maxima(layer.layout, layer.groups, layer.weight)
    factors = smooth_factors(seen.magnitude.to(weights.device), weights, strength)
    return tuple(factors.cpu().tolist())
