"""`accuracy_based_auto_calibration`: the search for a config that meets the user's accuracy."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from amct_pytorch.auto_calibration.evaluator import AutoCalibrationEvaluatorBase
from amct_pytorch.auto_calibration.model_evaluator import ModelEvaluator
from amct_pytorch.auto_calibration.sensitivity import (
    CosineSimilaritySensitivity,
    SensitivityBase,
)
from amct_pytorch.auto_calibration.strategy import (
    AutoCalibrationStrategyBase,
    BinarySearchStrategy,
)
from amct_pytorch.config.calibration_json import dump_calibration_json
from amct_pytorch.config.models import CalibrationConfig
from amct_pytorch.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    CalibrationError,
    did_you_mean,
    shown,
)
from amct_pytorch.files import PathLike, WholeFiles, check_distinct, check_writable, write_whole
from amct_pytorch.flows.arguments import public_call
from amct_pytorch.flows.calibration import CalibrationResult
from amct_pytorch.flows.outputs import output_path
from amct_pytorch.flows.post_training import save_model
from amct_pytorch.flows.preparation import InputData, Prepared, prepare
from amct_pytorch.flows.trials import Trials, identity_of
from amct_pytorch.graph.look import copy_model
from amct_pytorch.graph.tensors import ModelInputs, random_state_kept, tensors_in
from amct_pytorch.logs import logger, start_logging
from amct_pytorch.nn.intercept import LayerCall
from amct_pytorch.nn.simulate import IntegerOperands, Simulate, without_autograd
from amct_pytorch.nn.wrapped import CompressedLayer, Stage, compressed_layers
from amct_pytorch.processes import world_size
from amct_pytorch.record.factors import LayerFactors
from amct_pytorch.record.record_file import read_record, record_text
from amct_pytorch.report.ledger import output_entry
from amct_pytorch.spill import KeptInputs, Spill

if TYPE_CHECKING:
    from amct_pytorch.export.float_model import DynamicAxes

STEM = "accuracy_based_auto_calibration"
STRATEGIES = {"BinarySearch": BinarySearchStrategy}
SENSITIVITIES = {"CosineSimilarity": CosineSimilaritySensitivity}
# Trials for each layer that a strategy may ask for before it is taken to run in circles.
TRIALS_A_LAYER = 4


@public_call
def accuracy_based_auto_calibration(
    model: nn.Module,
    model_evaluator: AutoCalibrationEvaluatorBase,
    config_file: PathLike,
    record_file: PathLike,
    save_dir: PathLike,
    input_data: InputData,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_axes: DynamicAxes | None = None,
    strategy: str | AutoCalibrationStrategyBase = "BinarySearch",
    sensitivity: str | SensitivityBase = "CosineSimilarity",
    *,
    time_budget: float | None = None,
) -> None:
    """Finds a config that meets the user's accuracy by rolling sensitive layers back to float.

    The float model is evaluated, then the model quantized as the config says. If that is good
    enough, it is saved. Otherwise layers are ranked by how much quantization changes their own
    output on a calibration batch, the strategy chooses some to go back to float, and the rest
    is evaluated again, until the strategy stops. The model is calibrated once: a trial costs one
    evaluation, and what is evaluated is what is saved.

    Beside the models are written ``accuracy_based_auto_calibration_ranking_information.json``
    ([[layer, score], …], the most sensitive first), ``…_final_config.json`` (the config of what
    was saved) and ``…_record.json`` (every trial). The last is written after each trial: when
    the search was interrupted, the same call evaluates no trial twice.

    Args:
        model: float, weights loaded; left untouched.
        model_evaluator: calibrates and evaluates; its `calibration` must run `batch_num`
            batches or more.
        config_file: JSON written by `create_quant_config`; left untouched.
        record_file: record to write.
        save_dir: folder and prefix of what is written; see `save_model`.
        input_data: example inputs; see `quantize_model`, also for the next three.
        input_names: see there.
        output_names: see there.
        dynamic_axes: see there.
        strategy: ``BinarySearch``, or an instance of a subclass of
            `AutoCalibrationStrategyBase`.
        sensitivity: ``CosineSimilarity``, or an instance of a subclass of `SensitivityBase`.
        time_budget: seconds, ours: after them no further trial begins, nor one that would
            take the search beyond them if it took as long as the last one. The best config that
            was good enough until then is saved; the same call goes on. None: no limit.

    Raises:
        AmctError: naming the argument, file or layer, what was found and what is allowed.
    """
    start_logging(to_file=False)
    _check_instance(model_evaluator, AutoCalibrationEvaluatorBase, "model_evaluator", {})
    chosen = _check_instance(strategy, AutoCalibrationStrategyBase, "strategy", STRATEGIES)
    measure = _check_instance(sensitivity, SensitivityBase, "sensitivity", SENSITIVITIES)
    if world_size() > 1:
        raise CalibrationError(
            f"accuracy_based_auto_calibration runs in one process; there are {world_size()}"
        )
    if time_budget is not None and not _is_positive(time_budget):
        raise ArgumentValueError(
            f"time_budget is {shown(time_budget)}; allowed: a number of seconds above 0, or None"
        )
    files = _Files.of(save_dir)
    check_writable(record_file, "record_file")
    check_distinct(config_file=config_file, record_file=record_file)
    with tempfile.TemporaryDirectory() as scratch, closing(Spill("inputs to rank on")) as spill:
        onnx_file, scratch_record = Path(scratch) / "modified.onnx", Path(scratch) / "record.txt"
        names = (input_names, output_names, dynamic_axes)
        if Path(record_file).exists():
            # It may hold balance factors (quantize_preprocess).
            scratch_record.write_bytes(Path(record_file).read_bytes())
        search = _Search(model_evaluator, measure, files, spill, time_budget)
        prepared = prepare(
            config_file, onnx_file, scratch_record, model, input_data, names, search.calibrated,
            all_outputs=True,
        )  # fmt: skip
        search.calibrate(prepared, copy_model(model))
        kept = search.run(chosen)
        if kept is None:
            reason = (
                f"no trial was good enough within the time_budget of {time_budget} s"
                if search.out_of_time
                else "with all layers but the last rolled back, the accuracy is still not met"
            )
            logger.warning("no model is written: %s; see %s", reason, files.trials)
            return
        config = search.save_calibration(kept)
        save_model(onnx_file, scratch_record, save_dir)
        record = read_record(scratch_record)
        record.factors |= search.balance_of_others(kept)
        with WholeFiles() as written:
            text = record_text(record, str(record_file)).encode()
            written.write(record_file, text, what="record_file")
            text = dump_calibration_json(config).encode()
            written.write(files.config, text, what="save_dir")


@dataclass(frozen=True)
class _Files:
    """What the search writes beside the models."""

    ranking: Path
    config: Path
    trials: Path

    @classmethod
    def of(cls, save_dir: PathLike) -> _Files:
        folder = output_path(save_dir, "deploy", "save_dir").parent
        kinds = ("ranking_information", "final_config", "record")
        paths = [folder / f"{STEM}_{kind}.json" for kind in kinds]
        for path in paths:
            check_writable(path, "save_dir")
        return cls(*paths)


class _Rank(Stage):
    """Runs the float network; scores each layer's own quantized output on the same input."""

    def __init__(self, result: CalibrationResult, measure: SensitivityBase) -> None:
        self.scores: dict[str, float] = {}
        self._result = result
        self._measure = measure

    @without_autograd
    def run(self, layer: CompressedLayer, call: LayerCall) -> Tensor:
        """The float result."""
        y = layer.float_result(call)
        operands = self._result.operands.get(layer.name)
        if operands is not None:
            score = self._measure.compare(y, operands.run(layer, call))
            if not isinstance(score, (int, float)):
                raise ArgumentTypeError(
                    f"sensitivity: compare returned {shown(score)}; allowed: a number"
                )
            self.scores[layer.name] = float(score)
        return y


class _Search:
    """The trials of one search.

    Args:
        evaluator: the user's.
        measure: what layers are ranked by.
        files: where the trials are kept.
        spill: where a batch is kept that layers are ranked on.
        time_budget: seconds from now, or None.

    Attributes:
        out_of_time: whether the search ended because of it.
    """

    _prepared: Prepared
    _result: CalibrationResult
    _layers: dict[str, CompressedLayer]
    _corrected: dict[str, Tensor]
    _original: Any
    _trials: Trials

    def __init__(
        self,
        evaluator: AutoCalibrationEvaluatorBase,
        measure: SensitivityBase,
        files: _Files,
        spill: Spill,
        time_budget: float | None,
    ) -> None:
        self.out_of_time = False
        self._spill = spill
        self._deadline = None if time_budget is None else time.perf_counter() + time_budget
        self._trial_seconds = 0.0
        self._evaluator = evaluator
        self._measure = measure
        self._files = files
        self._inputs: KeptInputs | None = None
        self._finished = False

    def calibrated(self, prepared: Prepared, result: CalibrationResult) -> None:
        """Takes what calibration found; the files are written when the search has ended."""
        self._result, self._finished = result, True

    def calibrate(self, prepared: Prepared, float_model: nn.Module) -> None:
        """Evaluates the float model, then calibrates the quantized one."""
        self._prepared = prepared
        self._original = self._evaluator.evaluate(float_model)
        logger.info("metric of the float model: %s", self._original)
        hook = prepared.model.register_forward_pre_hook(self._keep, with_kwargs=True)
        try:
            self._run_batches(prepared)
        finally:
            hook.remove()
        if not self._finished:
            raise CalibrationError(
                "model_evaluator.calibration has run fewer than the config's batch_num "
                f"({prepared.config.batch_num}) batches; run them all in it"
            )
        self._layers = compressed_layers(prepared.model)
        self._corrected = {n: self._layers[n].bias.detach().clone() for n in self._result.operands}
        identity = identity_of(float_model, prepared.config, self._result.factors)
        self._trials = Trials(self._files.trials, identity, self._original)

    def _run_batches(self, prepared: Prepared) -> None:
        evaluator = self._evaluator
        if isinstance(evaluator, ModelEvaluator) and (
            type(evaluator).calibration is ModelEvaluator.calibration
        ):
            # Its own default is one batch.
            evaluator.calibration(prepared.model, prepared.config.batch_num)
        else:
            evaluator.calibration(prepared.model)

    def _keep(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._inputs is None:
            self._inputs = KeptInputs(ModelInputs(args, kwargs), self._spill)

    def run(self, strategy: AutoCalibrationStrategyBase) -> frozenset[str] | None:
        """The layers that stay quantized; None if no trial was good enough."""
        everything = frozenset(self._result.operands)
        verdict = self._try(everything)
        if verdict[0]:
            return everything
        ranking = self._ranking()
        text = json.dumps([[name, score] for name, score in ranking], indent=4)
        write_whole(self._files.ranking, text.encode(), what="save_dir")
        strategy.initialize(ranking)
        accepted: list[frozenset[str]] = []
        for _ in range(TRIALS_A_LAYER * len(everything) + 1):
            stop, flags = _checked(strategy.update_quant_config(verdict), everything)
            kept = frozenset(name for name in everything if flags[name])
            if stop:
                if kept in accepted:
                    return kept
                return accepted[-1] if accepted else None
            if not kept:
                raise CalibrationError(
                    "strategy: update_quant_config rolls back every layer and does not stop; "
                    "nothing would be left to quantize"
                )
            if self._no_time_for(kept):
                self.out_of_time = True
                logger.warning(
                    "time_budget: the search ends before it was done; layers in float so far: %s",
                    len(everything) - len(accepted[-1]) if accepted else "none were enough",
                )
                return accepted[-1] if accepted else None
            verdict = self._try(kept)
            if verdict[0]:
                accepted.append(kept)
        raise CalibrationError(
            f"strategy: update_quant_config has not stopped after "
            f"{TRIALS_A_LAYER * len(everything) + 1} trials for {len(everything)} layers"
        )

    def _no_time_for(self, kept: frozenset[str]) -> bool:
        if self._deadline is None or self._is_known(self._rolled_back(kept)):
            return False
        return time.perf_counter() + self._trial_seconds > self._deadline

    def _rolled_back(self, kept: frozenset[str]) -> list[str]:
        return [name for name in self._result.operands if name not in kept]

    def _is_known(self, rolled_back: list[str]) -> bool:
        trials = self._trials
        return (trials.done(rolled_back) or trials.earlier(rolled_back)) is not None

    def _try(self, kept: frozenset[str]) -> tuple[bool, float]:
        """Evaluates the model with some layers quantized, unless an earlier run did."""
        rolled_back = self._rolled_back(kept)
        done = self._trials.done(rolled_back)
        if done is not None:
            return bool(done["accepted"]), float(done["loss"])
        known = self._trials.earlier(rolled_back)
        if known is not None:
            logger.info("trial with %d layers in float: known", len(rolled_back))
            return self._judge(rolled_back, known["metric"])
        self._activate(kept)
        started = time.perf_counter()
        metric = self._evaluator.evaluate(self._prepared.model)
        self._trial_seconds = time.perf_counter() - started
        logger.info("trial with %d layers in float: %.1f s", len(rolled_back), self._trial_seconds)
        return self._judge(rolled_back, metric)

    def _judge(self, rolled_back: list[str], metric: Any) -> tuple[bool, float]:
        """The evaluator's verdict on a metric, which may be an earlier run's; keeps the trial."""
        accepted, loss = _checked_verdict(self._evaluator.metric_eval(self._original, metric))
        logger.info("metric %s: %s, lost %g", metric, "accepted" if accepted else "rejected", loss)
        self._trials.add(rolled_back, metric, accepted, loss)
        return accepted, loss

    def _activate(self, kept: frozenset[str]) -> None:
        """Quantizes these layers; the others run in float, with their own biases."""
        operands: dict[str, IntegerOperands] = {
            name: found for name, found in self._result.operands.items() if name in kept
        }
        for name, layer in self._layers.items():
            layer.stage = Simulate(operands)
            if name in self._corrected:
                biases = self._corrected if name in kept else self._result.float_biases
                layer.bias.data.copy_(biases[name])

    def _ranking(self) -> list[tuple[str, float]]:
        """Layers and scores, the lowest first."""
        self._activate(frozenset())
        rank = _Rank(self._result, self._measure)
        self._run_kept(rank)
        # A layer that the kept batch does not reach has nothing against it.
        best = max(rank.scores.values(), default=1.0)
        scores = {name: rank.scores.get(name, best) for name in self._result.operands}
        return sorted(scores.items(), key=lambda entry: entry[1])

    def _run_kept(self, stage: Stage | None) -> list[Tensor]:
        """Outputs for the kept batch, with `stage` in all layers; None: what they have."""
        model = self._prepared.model
        if stage is not None:
            for layer in self._layers.values():
                layer.stage = stage
        assert self._inputs is not None
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with torch.no_grad(), random_state_kept(model):
            outputs = [t.detach() for t in tensors_in(self._inputs.taken().call(model))]
        for name, buffer in model.named_buffers():
            buffer.data.copy_(buffers[name])
        return outputs

    def balance_of_others(self, kept: frozenset[str]) -> dict[str, LayerFactors]:
        """Balance factors of layers that go back to float: the next search needs them again."""
        return {
            name: LayerFactors(balance=found.balance)
            for name, found in self._result.factors.items()
            if name not in kept and found.balance
        }

    def save_calibration(self, kept: frozenset[str]) -> CalibrationConfig:
        """Completes the files of calibration for these layers; returns their config."""
        result, config = self._result, self._prepared.config
        self._activate(frozenset())
        original = self._run_kept(None)
        self._activate(kept)
        output = output_entry(original, self._run_kept(None))
        layers = {
            name: layer if name in kept else layer.model_copy(update={"quant_enable": False})
            for name, layer in config.layers.items()
        }
        config = config.model_copy(update={"layers": layers})
        factors = {name: found for name, found in result.factors.items() if name in kept}
        self._prepared.complete(replace(result, factors=factors, output=output), config)
        return config


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _check_instance(value: Any, base: type, what: str, names: Mapping[str, type]) -> Any:
    """An instance of `base`, made from its name if need be."""
    if isinstance(value, base):
        return value
    allowed = f"an instance of a subclass of {base.__name__}"
    if isinstance(value, str) and names:
        if value in names:
            return names[value]()
        raise ArgumentValueError(
            f"{what} is {shown(value)}{did_you_mean(value, names)}; allowed: "
            f"{', '.join(names)}, or {allowed}"
        )
    told = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
    raise ArgumentTypeError(
        f"{what} is {told}; allowed: {', '.join(names)}{', or ' if names else ''}{allowed}"
    )


def _checked_verdict(verdict: Any) -> tuple[bool, float]:
    try:
        accepted, loss = verdict
        return bool(accepted), float(loss)
    except (TypeError, ValueError):
        raise ArgumentTypeError(
            f"model_evaluator: metric_eval returned {shown(verdict)}; allowed: whether it is good "
            "enough, and a number, what was lost"
        ) from None


def _checked(update: Any, layers: frozenset[str]) -> tuple[bool, Mapping[str, bool]]:
    try:
        stop, flags = update
        named = set(flags)
    except (TypeError, ValueError):
        raise ArgumentTypeError(
            f"strategy: update_quant_config returned {shown(update)}; allowed: whether to stop, "
            "and a dict of true or false by layer"
        ) from None
    wrong = sorted(named ^ layers)
    if wrong:
        raise ArgumentValueError(
            f"strategy: update_quant_config's flags and the ranking differ in {wrong[0]!r}; "
            "allowed: one flag for each layer of the ranking"
        )
    return bool(stop), flags
