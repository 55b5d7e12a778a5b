"""Post-training calibration: observe `batch_num` float batches, solve, simulate from then on."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from amct_pytorch.algorithms.ada_learning import AdaSettings
from amct_pytorch.algorithms.arq import bias_limit
from amct_pytorch.algorithms.solve import complete_factors, weight_factors
from amct_pytorch.config.models import AdaParams, CalibrationConfig
from amct_pytorch.errors import AmctError, CalibrationError
from amct_pytorch.graph.activations import Activation
from amct_pytorch.graph.look import copy_sharing_weights
from amct_pytorch.graph.tensors import ModelInputs, in_float64, random_state_kept, tensors_in
from amct_pytorch.graph.trace import where_it_failed
from amct_pytorch.logs import logger
from amct_pytorch.memory import release_memory
from amct_pytorch.nn.calibrate import Check, LayerErrors, Observe, corrected_bias
from amct_pytorch.nn.reconstruct import FloatRows, Reconstruct, Reconstruction
from amct_pytorch.nn.simulate import IntegerOperands, Simulate, integer_bias
from amct_pytorch.nn.wrapped import compressed_layers
from amct_pytorch.observers.statistics import LayerStatistics
from amct_pytorch.processes import gathered, in_one_process, rank, world_size
from amct_pytorch.record.factors import LayerFactors
from amct_pytorch.report.ledger import OutputEntry, output_entry


@dataclass(frozen=True)
class CalibrationResult:
    """What calibration found.

    Attributes:
        factors: complete factors by layer, in module order.
        statistics: what was observed, by layer.
        errors: of each layer that ran on the last batch.
        output: agreement of the whole model's output on that batch.
        widened: number of weight scales made larger so that the integer bias fits, by layer.
        corrects: whether bias correction was asked for.
        not_run: layers that no calibration batch went through; they stay float.
        seconds: wall time of the steps.
        operands: what the layers compute on, by layer.
        float_biases: the bias of each layer before correction.
        rounded: what ADA did to each layer that it was asked for.
    """

    factors: dict[str, LayerFactors]
    statistics: dict[str, LayerStatistics]
    errors: dict[str, LayerErrors]
    output: OutputEntry | None
    widened: dict[str, int]
    corrects: bool
    not_run: tuple[str, ...]
    seconds: dict[str, float]
    operands: dict[str, IntegerOperands]
    float_biases: dict[str, Tensor]
    rounded: dict[str, Reconstruction] = field(default_factory=dict)


@dataclass(frozen=True)
class _Found:
    """What the other processes need of the one that solved.

    Attributes:
        result: what it found.
        biases: those that are deployed, by layer.
    """

    result: CalibrationResult
    biases: dict[str, Tensor]

    def __getstate__(self) -> dict[str, Any]:
        # The others have the statistics, and make the operands anew.
        return {
            "result": replace(self.result, statistics={}, operands={}),
            "biases": self.biases,
        }


def _share_of_batches(config: CalibrationConfig) -> int:
    """How many of the config's batches this process is to run: every world_size-th one.

    Raises:
        CalibrationError: there are fewer batches than processes, or ADA on several ones.
    """
    if world_size() == 1:
        return config.batch_num
    if config.batch_num < world_size():
        raise CalibrationError(
            f"batch_num is {config.batch_num} and there are {world_size()} processes; allowed: "
            "at least one batch for each (batch_num counts those of all processes together)"
        )
    learned = list(ada_settings(config))
    if learned:
        raise CalibrationError(
            f"layer {learned[0]!r} asks for ada_quantize, which needs all batches in one process; "
            f"there are {world_size()}"
        )
    return len(range(rank(), config.batch_num, world_size()))


def ada_settings(config: CalibrationConfig) -> dict[str, AdaSettings]:
    """What the config asks of ADA, by layer."""
    found = {}
    for name, layer in config.enabled_layers().items():
        params = layer.weight_quant_params
        if isinstance(params, AdaParams):
            found[name] = AdaSettings(
                params.num_iteration, params.reg_param, params.beta_range, params.warm_start
            )
    return found


class Calibration:
    """Drives an instrumented model through calibration by hooks on its forward.

    The last batch is run a second time, through the quantized network, to measure every
    layer's error.

    Args:
        model: instrumented by `nn.instrument`, in eval mode.
        config: the calibration config.
        with_outputs: layers whose output range is wanted too.
        activations: the activation behind each layer that has one, for those that ADA rounds.
        balance: the factors that layers were balanced with, by layer.
        example: inputs that the model is known to run on, for messages.
        finished: called once with the result, after the last batch.
    """

    def __init__(
        self,
        model: nn.Module,
        config: CalibrationConfig,
        with_outputs: frozenset[str],
        activations: Mapping[str, Activation],
        balance: Mapping[str, tuple[float, ...]],
        example: ModelInputs,
        finished: Callable[[CalibrationResult], None],
    ) -> None:
        self._model = model
        self._config = config
        self._layers = compressed_layers(model)
        self._own_batches = _share_of_batches(config)
        self._example = str(example)
        self._finished = finished
        self._activations = activations
        self._balance = balance
        self._ada = {
            name: settings
            for name, settings in ada_settings(config).items()
            if self._layers[name].kind.ada
        }
        learned = {name: self._layers[name] for name in self._ada}
        self._rows = FloatRows(learned, config.batch_num) if learned else None
        # Copied before this object hooks itself in; the passes of ADA take copies of this.
        self._untouched = copy_sharing_weights(model) if learned else None
        self._observe = Observe(
            self._layers, with_outputs, self._rows, with_means=config.bias_correction
        )
        self._last_inputs: ModelInputs | None = None
        self._solving = False
        self._in_batch = False
        self._started = 0.0
        self._observing_seconds = 0.0
        for layer in self._layers.values():
            layer.stage = self._observe
        handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]
        self._stop_watching = [*(handle.remove for handle in handles), self._explain_errors()]

    def _explain_errors(self) -> Callable[[], None]:
        """Makes the model's forward tell of an error in which batch it was, and of what.

        Returns:
            A function that ends this.
        """
        model, forward = self._model, self._model.forward
        before = vars(model).get("forward")

        @functools.wraps(forward)
        def explained(*args: Any, **kwargs: Any) -> Any:
            try:
                return forward(*args, **kwargs)
            except AmctError:
                raise
            except Exception as error:
                names = {layer.layer: layer.name for layer in self._layers.values()}
                place = where_it_failed(model, error.__traceback__, names)
                raise CalibrationError(
                    f"calibration batch {self._observe.batch + 1} cannot be run: "
                    f"{type(error).__name__} {place}: {error}. The batch is "
                    f"{ModelInputs(args, kwargs)}; input_data was {self._example}"
                ) from error

        def end() -> None:
            if before is None:
                del model.forward
            else:
                model.forward = before

        model.forward = explained
        return end

    def initial_factors(self) -> dict[str, LayerFactors]:
        """The factors that are known before any batch: those of the weights."""
        return {
            name: weight_factors(
                name, self._config, layer.layout, layer.weight, self._balance.get(name, ())
            )
            for name, layer in self._layers.items()
        }

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._solving:
            return
        if model.training:
            logger.warning("calibration runs in eval mode; the model was in training mode")
            model.eval()
        if self._in_batch:
            raise CalibrationError(
                "an earlier calibration batch failed half-way, so what it left is incomplete; call "
                "quantize_model again"
            )
        self._in_batch = True
        self._started = time.perf_counter()
        self._observe.last = self._observe.batch == self._own_batches - 1
        if self._rows is not None:
            self._rows.keep_inputs(ModelInputs(args, kwargs))
        if self._observe.last:
            # A copy: the forward may change its arguments.
            self._last_inputs = ModelInputs(args, kwargs).copied()

    def _after(self, _: nn.Module, __: tuple[Any, ...], ___: dict[str, Any], outputs: Any) -> None:
        if self._solving:
            return
        self._observe.batch += 1
        self._observing_seconds += time.perf_counter() - self._started
        logger.info("calibration batch %d of %d", self._observe.batch, self._own_batches)
        if self._observe.last:
            self._finish(outputs)
        self._in_batch = False

    def _finish(self, outputs: Any) -> None:
        """Solves, switches to simulation and hands the result over."""
        self._solving = True
        try:
            # Tensors made under the caller's inference mode could not be changed later.
            with torch.inference_mode(False), torch.no_grad():
                result = self._solved_by_one([t.detach() for t in tensors_in(outputs)])
        finally:
            self._solving = False
        in_one_process(lambda: self._finished(result), 0)
        for stop in self._stop_watching:
            stop()

    def _solved_by_one(self, float_outputs: list[Tensor]) -> CalibrationResult:
        """What one process finds from the statistics of all; each has it afterwards.

        It is the one that ran the last batch, which the quantized network is checked on.
        """
        last = (self._config.batch_num - 1) % world_size()
        if world_size() > 1:
            calls = {n: call.without_operands() for n, call in self._observe.calls.items()}
            everyone = gathered((self._observe.statistics, calls))
            merged, _ = everyone[0]
            for name, statistics in merged.items():
                for other, _ in everyone[1:]:
                    statistics.merge(other[name])
                statistics.output = everyone[last][0][name].output
            self._observe.statistics = merged
            # A layer may have run in another process only.
            for _, others in everyone:
                self._observe.calls = others | self._observe.calls
        found = in_one_process(lambda: self._found(float_outputs), last)
        if rank() == last:
            return found.result
        with torch.no_grad():
            for name, bias in found.biases.items():
                self._layers[name].bias.copy_(bias)
        factors = found.result.factors
        operands = {n: IntegerOperands.of(self._layers[n], one) for n, one in factors.items()}
        for layer in self._layers.values():
            layer.stage = Simulate(operands)
        return replace(found.result, statistics=self._observe.statistics, operands=operands)

    def _found(self, float_outputs: list[Tensor]) -> _Found:
        result = self._solve(float_outputs)
        return _Found(result, {n: self._layers[n].bias.detach() for n in result.factors})

    def _solve(self, float_outputs: list[Tensor]) -> CalibrationResult:
        started = time.perf_counter()
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
        searched = time.perf_counter()
        operands = {
            name: IntegerOperands.of(self._layers[name], known) for name, known in factors.items()
        }
        float_biases = {name: self._layers[name].bias.detach().clone() for name in operands}
        changes = self._correct(operands)
        for known in statistics.values():
            known.mean_input = None  # as large as the network's activations on one item
        release_memory()
        corrected = time.perf_counter()
        rounded = self._round(factors, operands, changes)
        learned = time.perf_counter()
        errors, output = self._check(operands, changes, float_outputs)
        for layer in self._layers.values():
            layer.stage = Simulate(operands)
        seconds = {
            "observe": self._observing_seconds,
            "search ranges": searched - started,
            "correct biases": corrected - searched,
            "check": time.perf_counter() - learned,
        }
        if rounded:
            seconds["learn rounding"] = learned - corrected
        return CalibrationResult(
            factors,
            statistics,
            errors,
            output,
            widened,
            self._config.bias_correction,
            not_run,
            seconds,
            operands,
            float_biases,
            rounded,
        )

    def _round(
        self,
        factors: dict[str, LayerFactors],
        operands: dict[str, IntegerOperands],
        changes: dict[str, Tensor],
    ) -> dict[str, Reconstruction]:
        """Rounds the layers that ADA is asked for; changes what is given for them."""
        if self._rows is None or self._untouched is None:
            return {}
        order = [name for name in self._observe.calls if name in self._ada and name in operands]
        reconstruct = Reconstruct(
            self._untouched,
            {name: self._ada[name] for name in order},
            {name: self._activations.get(name) for name in order},
            {name for name in order if not self._config.asymmetric(name)},
            factors,
            operands,
            self._rows,
        )
        try:
            with random_state_kept(self._model):
                reconstruct.run()
        finally:
            self._rows.close()
        self._rows = self._untouched = None
        for name, result in reconstruct.results.items():
            if result.rounded is not None:
                changes.pop(name, None)
        return reconstruct.results

    def _correct(self, operands: dict[str, IntegerOperands]) -> dict[str, Tensor]:
        """Corrects the integer biases in `operands`; returns corrected minus original bias."""
        changes = {}
        for name, found in operands.items():
            layer, mean_input = self._layers[name], self._observe.statistics[name].mean_input
            if mean_input is None or layer.layout is None or name not in self._observe.calls:
                continue
            call = self._observe.calls[name]
            limit = bias_limit(found.bias_scale)
            bias = corrected_bias(layer, found, call, mean_input, limit)
            changes[name] = bias - in_float64(layer.bias)
            operands[name] = replace(found, bias=integer_bias(bias, found.bias_scale))
        return changes

    def _check(
        self,
        operands: dict[str, IntegerOperands],
        changes: dict[str, Tensor],
        float_outputs: list[Tensor],
    ) -> tuple[dict[str, LayerErrors], OutputEntry | None]:
        """Measures every layer on the last batch, then fixes the biases that stay corrected."""
        check = Check(operands, self._observe.statistics, changes)
        for layer in self._layers.values():
            layer.stage = check
        assert self._last_inputs is not None
        buffers = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
        with random_state_kept(self._model):
            outputs = list(tensors_in(self._last_inputs.call(self._model)))
        for name, buffer in self._model.named_buffers():
            buffer.data.copy_(buffers[name])
        self._last_inputs = None
        for name, change in changes.items():
            errors = check.errors.get(name)
            if errors is None or errors.corrected:
                layer = self._layers[name]
                layer.bias.data.copy_(in_float64(layer.bias) + change)
                bias = integer_bias(layer.bias, operands[name].bias_scale)
                operands[name] = replace(operands[name], bias=bias)
        return check.errors, output_entry(float_outputs, outputs)
