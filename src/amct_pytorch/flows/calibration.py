"""Post-training calibration: observe `batch_num` float batches, solve, simulate from then on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from amct_pytorch.algorithms.bias_correction import BiasCorrection
from amct_pytorch.algorithms.solve import BIAS_LIMIT, complete_factors, weight_factors
from amct_pytorch.config.models import CalibrationConfig
from amct_pytorch.errors import CalibrationError
from amct_pytorch.graph.tensors import ModelInputs, tensors_in
from amct_pytorch.logs import logger
from amct_pytorch.nn.calibrate import LayerErrors, Observe, Solve
from amct_pytorch.nn.simulate import IntegerOperands, Simulate, integer_bias
from amct_pytorch.nn.wrapped import compressed_layers
from amct_pytorch.observers.batch_store import BatchStore
from amct_pytorch.observers.statistics import LayerStatistics
from amct_pytorch.record.factors import LayerFactors
from amct_pytorch.report.ledger import OutputEntry, output_entry


@dataclass(frozen=True)
class CalibrationResult:
    """What calibration found.

    Attributes:
        factors: complete factors by layer, in module order.
        statistics: what was observed, by layer.
        errors: of each layer that ran on the last batch run again.
        output: agreement of the whole model's output on that batch.
        widened: number of weight scales made larger so that the integer bias fits, by layer.
        corrects: whether bias correction was asked for.
        not_run: layers that no calibration batch went through; they stay float.
        seconds: wall time of the steps.
    """

    factors: dict[str, LayerFactors]
    statistics: dict[str, LayerStatistics]
    errors: dict[str, LayerErrors]
    output: OutputEntry | None
    widened: dict[str, int]
    corrects: bool
    not_run: tuple[str, ...]
    seconds: dict[str, float]


class Calibration:
    """Drives an instrumented model through calibration by hooks on its forward.

    Half of the batches (every second one, from the first) are kept and run again through the
    quantized network once ranges are known: that pass corrects the biases and measures every
    layer's error. Half is enough for stable means, and bounds the time.

    Args:
        model: instrumented by `nn.instrument`, in eval mode.
        config: the calibration config.
        with_outputs: layers whose output range is wanted too.
        finished: called once with the result, after the last batch.
    """

    def __init__(
        self,
        model: nn.Module,
        config: CalibrationConfig,
        with_outputs: frozenset[str],
        finished: Callable[[CalibrationResult], None],
    ) -> None:
        self._model = model
        self._config = config
        self._layers = compressed_layers(model)
        self._finished = finished
        self._observe = Observe(list(self._layers), with_outputs)
        self._store = BatchStore()
        self._outputs: list[Tensor] = []
        self._batches = 0
        self._solving = False
        self._observing_seconds = 0.0
        self._started = 0.0
        for layer in self._layers.values():
            layer.stage = self._observe
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]

    def initial_factors(self) -> dict[str, LayerFactors]:
        """The factors that are known before any batch: those of the weights."""
        return {
            name: weight_factors(name, self._config, layer.kind, layer.weight)
            for name, layer in self._layers.items()
        }

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._solving:
            return
        if model.training:
            logger.warning("calibration runs in eval mode; the model was in training mode")
            model.eval()
        self._started = time.perf_counter()
        self._observe.begin(self._batches, kept=self._batches % 2 == 0)
        if self._observe.kept:
            self._store.put(self._batches, ModelInputs(args, kwargs))

    def _after(
        self, _: nn.Module, __: tuple[Any, ...], ___: dict[str, Any], outputs: Any
    ) -> None:
        if self._solving:
            return
        if self._observe.kept:
            self._outputs = [t.detach().clone() for t in tensors_in(outputs)]
        self._batches += 1
        self._observing_seconds += time.perf_counter() - self._started
        logger.info("calibration batch %d of %d", self._batches, self._config.batch_num)
        if self._batches == self._config.batch_num:
            self._finish()

    def _finish(self) -> None:
        """Solves, switches to simulation and hands the result over."""
        started = time.perf_counter()
        self._solving = True
        try:
            # Tensors made under the caller's inference mode could not be changed later.
            with torch.inference_mode(False), torch.no_grad():
                result = self._solve(started)
        finally:
            self._store.close()
            self._outputs = []
        for handle in self._handles:
            handle.remove()
        self._finished(result)

    def _solve(self, started: float) -> CalibrationResult:
        statistics = self._observe.statistics
        not_run = tuple(name for name in self._layers if statistics[name].inputs.total == 0)
        if len(not_run) == len(self._layers):
            raise CalibrationError("no layer that the config enables ran on the calibration data")
        for name in not_run:
            logger.warning("layer %r did not run on any calibration batch; it stays float", name)
        initial = self.initial_factors()
        factors = {
            name: complete_factors(
                name, self._config, known, self._layers[name].bias, statistics[name].inputs
            )
            for name, known in initial.items()
            if name not in not_run
        }
        widened = {
            name: sum(a != b for a, b in zip(known.scale_w, initial[name].scale_w, strict=True))
            for name, known in factors.items()
        }
        solved = time.perf_counter()
        operands = {
            name: IntegerOperands.of(self._layers[name], known) for name, known in factors.items()
        }
        errors, output = self._correct(operands)
        for layer in self._layers.values():
            layer.stage = Simulate(operands)
        seconds = {
            "observe": self._observing_seconds,
            "search ranges": solved - started,
            "correct biases": time.perf_counter() - solved,
        }
        return CalibrationResult(
            factors,
            statistics,
            errors,
            output,
            widened,
            self._config.bias_correction,
            not_run,
            seconds,
        )

    def _correct(
        self, operands: dict[str, IntegerOperands]
    ) -> tuple[dict[str, LayerErrors], OutputEntry | None]:
        """Runs the kept batches through the quantized network; sets biases, measures errors."""
        corrections = {}
        if self._config.bias_correction:
            corrections = {
                name: BiasCorrection(self._layers[name].bias, BIAS_LIMIT * found.dequant_scale)
                for name, found in operands.items()
            }
        solve = Solve(operands, self._observe.statistics, corrections)
        for layer in self._layers.values():
            layer.stage = solve
        outputs: list[Tensor] = []
        for number, inputs in self._store.batches():
            solve.begin(number, last=number == self._observe.last_kept)
            outputs = list(tensors_in(inputs.call(self._model)))
        for name, correction in corrections.items():
            layer = self._layers[name]
            layer.bias.data.copy_(correction.bias.to(layer.bias.dtype))
            bias = integer_bias(layer.bias, operands[name].dequant_scale)
            operands[name] = replace(operands[name], bias=bias)
        return solve.errors, output_entry(self._outputs, outputs)
