"""Layer after layer, rounding weights so that the float network's results come out again."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from amct_pytorch.algorithms.ada_learning import AdaSettings
from amct_pytorch.algorithms.ada_round import Rounded, ada_round
from amct_pytorch.algorithms.arq import bias_limit, floored_for_bias
from amct_pytorch.algorithms.solve import fp16_scale
from amct_pytorch.algorithms.unit import Unit
from amct_pytorch.algorithms.unit_range import best_range, quantized
from amct_pytorch.formats import IntFormat
from amct_pytorch.graph.activations import Activation
from amct_pytorch.graph.look import copy_sharing_weights
from amct_pytorch.graph.tensors import ModelInputs, without_autocast
from amct_pytorch.logs import logger
from amct_pytorch.nn.intercept import LayerCall
from amct_pytorch.nn.lockstep import Lockstep
from amct_pytorch.nn.rows import (
    choose_positions,
    input_rows,
    output_rows,
    row_values,
    weight_from_matrices,
    weight_matrices,
)
from amct_pytorch.nn.simulate import IntegerOperands, without_autograd
from amct_pytorch.nn.wrapped import CompressedLayer, Stage, compressed_layers
from amct_pytorch.record.factors import FORCE_FP16, LayerFactors
from amct_pytorch.spill import KeptInputs, Spill

# Rows of a layer's input, from all batches together.
ROW_BYTES = 2**26
MOST_ROWS, FEWEST_ROWS = 8192, 512
# Of the inputs of one layer, for all passes that wait at it; what is more is set aside on disk.
WAITING_BYTES = 2**30
# The product of matrices and the layer's own call differ by float32 rounding.
SAME = 1e-3


class FloatRows:
    """Sampled outputs of the float network, and its inputs, over all batches; kept on disk.

    Args:
        layers: those whose outputs are wanted.
        batches: how many there will be.
    """

    def __init__(self, layers: Mapping[str, CompressedLayer], batches: int) -> None:
        self._numbers = {name: -(-_rows(layer) // batches) for name, layer in layers.items()}
        self._seeds = {name: i for i, name in enumerate(layers)}
        self._spill = Spill("calibration inputs, sampled outputs and large activations")
        self._inputs: list[KeptInputs] = []
        self._taken: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def keep_inputs(self, inputs: ModelInputs) -> None:
        """Of the next batch."""
        self._inputs.append(KeptInputs(inputs, self._spill))

    @property
    def batches(self) -> int:
        """How many batches' inputs there are."""
        return len(self._inputs)

    def inputs(self, batch: int) -> ModelInputs:
        """Of one batch, each tensor a copy where it was."""
        return self._inputs[batch].taken()

    def set_aside(self, x: Tensor) -> None:
        """Moves the input of a layer at which its pass will wait to the disk, if it is large.

        What else is alive in a waiting forward has been such an input too, as a rule: a residual
        branch begins with what a layer reads.
        """
        if x.nbytes * self.batches > WAITING_BYTES:
            self._spill.set_aside(x)

    def take(self, layer: CompressedLayer, y: Tensor) -> None:
        """Samples a layer's float output in the present batch."""
        if layer.name not in self._numbers:
            return
        batch = self.batches - 1
        axis = layer.kind.channel_axis
        seed = 1000 * batch + self._seeds[layer.name]
        positions = choose_positions(y, axis, self._numbers[layer.name], seed)
        rows = self._spill.keep(output_rows(y, positions, axis).float())
        self._taken[layer.name, batch] = (positions, rows)

    def has(self, name: str, batch: int) -> bool:
        """Whether the layer ran in the float network on this batch."""
        return (name, batch) in self._taken

    def of(self, name: str, batch: int) -> tuple[Tensor, Tensor]:
        """Positions, and float32 outputs [positions, channels] there."""
        return self._taken[name, batch]

    def close(self) -> None:
        """Removes what is on disk."""
        self._spill.close()


def _rows(layer: CompressedLayer) -> int:
    return min(MOST_ROWS, max(FEWEST_ROWS, ROW_BYTES // (4 * row_values(layer))))


@dataclass(frozen=True)
class Reconstruction:
    """What became of one layer.

    Attributes:
        rounded: by ADA; None where the layer's call could not be followed.
        seconds: wall time.
    """

    rounded: Rounded | None
    seconds: float


@dataclass(frozen=True)
class _Rows:
    """What one pass brings to a layer: inputs [groups, rows, K] and targets [rows, channels]."""

    inputs: Tensor
    targets: Tensor
    follows: bool


class _Walk(Stage):
    """In one pass: runs the quantized network, waiting at each layer to be solved."""

    def __init__(
        self,
        batch: int,
        operands: Mapping[str, IntegerOperands],
        rows: FloatRows,
        lockstep: Lockstep[_Rows],
        wanted: frozenset[str],
        followed: set[str],
    ) -> None:
        self._batch = batch
        self._operands = operands
        self._rows = rows
        self._lockstep = lockstep
        self._wanted = wanted
        self._followed = followed

    @without_autograd
    def run(self, layer: CompressedLayer, call: LayerCall) -> Tensor:
        """The quantized result; the float one for a layer without operands."""
        if layer.name not in self._operands:
            return layer.float_result(call)
        # A forward that branches on its data may go another way here than in float.
        if layer.name in self._wanted and self._rows.has(layer.name, self._batch):
            self._lockstep.arrive(layer.name, lambda: self._bring(layer, call))
        return self._operands[layer.name].run(layer, call)

    def _bring(self, layer: CompressedLayer, call: LayerCall) -> _Rows:
        with without_autocast(call.x.device.type):
            brought = self._brought(layer, call)
        self._rows.set_aside(call.x)
        return brought

    def _brought(self, layer: CompressedLayer, call: LayerCall) -> _Rows:
        positions, targets = self._rows.of(layer.name, self._batch)
        raw = input_rows(layer, call, call.x, positions).float()
        follows = True
        if layer.name not in self._followed:
            # A call does not change its kind from batch to batch.
            self._followed.add(layer.name)
            operands = self._operands[layer.name]
            # Integers, as the layer computes on them; what is outside the input is 0 there too.
            rows = operands.quantized_input(raw)
            matrices = weight_matrices(layer, operands.weight.float())
            product = torch.matmul(rows, matrices).transpose(0, 1).flatten(1)
            sums = call.run(operands.quantized_input(call.x), operands.weight.float(), None)
            meant = output_rows(sums, positions, layer.kind.channel_axis)
            allowed = SAME * float(meant.abs().max())
            follows = bool(((product - meant).abs() <= allowed).all())
        return _Rows(raw, targets.to(raw.device), follows)


class Reconstruct:
    """Rounds the weights of some layers by ADA, in the order they run.

    Args:
        model: instrumented, in eval mode, without hooks; shares its weights with the one that is
            calibrated.
        settings: of the layers that are wanted, in the order they run.
        activations: that behind each of them, if there is one.
        symmetric: layers whose inputs have no zero point.
        factors: complete factors of all quantized layers; changed for those that are wanted.
        operands: likewise.
        rows: what was taken of the float network.

    Attributes:
        results: by layer.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Mapping[str, AdaSettings],
        activations: Mapping[str, Activation | None],
        symmetric: Container[str],
        factors: dict[str, LayerFactors],
        operands: dict[str, IntegerOperands],
        rows: FloatRows,
    ) -> None:
        self._model = model
        self._layers = compressed_layers(model)
        self._settings = settings
        self._activations = activations
        self._symmetric = symmetric
        self._factors = factors
        self._operands = operands
        self._rows = rows
        self._few: list[str] = []  # layers with fewer rows than weights for each output
        self.results: dict[str, Reconstruction] = {}

    def run(self) -> None:
        """Goes through the network once, with all batches in lockstep."""
        lockstep: Lockstep[_Rows] = Lockstep(list(self._settings), self._solve)
        wanted = frozenset(self._settings)
        passes, followed = [], set[str]()
        for batch in range(self._rows.batches):
            stage = _Walk(batch, self._operands, self._rows, lockstep, wanted, followed)
            passes.append(self._pass(batch, stage))
        with tqdm(total=len(wanted), desc="ADA", unit="layer", disable=None) as self._bar:
            lockstep.run(passes)
        if self._few:
            logger.warning(
                "ADA: %d of %d layers have fewer rows of calibration data than weights for each "
                "output (%s first): it can fit these rows and be worse on other data; give more "
                "samples, or compare with nearest rounding on data of your own",
                len(self._few),
                len(wanted),
                self._few[0],
            )

    def _pass(self, batch: int, stage: Stage) -> Callable[[], object]:
        def run() -> None:
            # A copy of its own: a forward may keep what it has computed on the module.
            model = copy_sharing_weights(self._model)
            for layer in compressed_layers(model).values():
                layer.stage = stage
            self._rows.inputs(batch).call(model)

        return run

    def _solve(self, name: str, brought: Sequence[_Rows]) -> None:
        self._bar.set_postfix_str(name)
        started = time.perf_counter()
        layer, factors = self._layers[name], self._factors[name]
        rounded = None
        if all(rows.follows for rows in brought):
            with without_autocast(layer.weight.device.type):
                rounded = self._rounded(layer, factors, brought)
        else:
            logger.warning("%s: its call cannot be followed by ADA; rounded to nearest", name)
        self.results[name] = Reconstruction(rounded, time.perf_counter() - started)
        self._bar.update()

    def _rounded(
        self, layer: CompressedLayer, factors: LayerFactors, brought: Sequence[_Rows]
    ) -> Rounded:
        name = layer.name
        assert factors.scale_d is not None
        unit = Unit(
            torch.cat([rows.inputs for rows in brought], 1),
            torch.cat([rows.targets.T for rows in brought], 1).T,
            weight_matrices(layer, layer.weight.detach().float()),
            layer.bias.detach().float(),
            self._activations[name],
        )
        _, rows, values = unit.inputs.shape
        if rows < min(values, _rows(layer)):
            self._few.append(f"{name} ({rows} < {values})")
        inputs = IntFormat(factors.activation_bits)
        scale_d, offset_d = best_range(
            unit,
            factors.scale_d,
            factors.offset_d,
            inputs,
            symmetric=name in self._symmetric,
        )
        if factors.fakequant_precision_mode == FORCE_FP16:
            scale_d = fp16_scale(scale_d)
        unit = replace(unit, inputs=quantized(unit.inputs, scale_d, offset_d, inputs))
        scale = torch.tensor(factors.scale_w).to(layer.weight.device)
        nothing = torch.zeros_like(scale)
        limit = bias_limit(scale)
        least = floored_for_bias(nothing, scale_d, layer.bias, limit)
        scale = torch.maximum(scale, least)
        rounded = ada_round(
            unit, scale, least, IntFormat(factors.weight_bits), self._settings[name]
        )
        found = replace(
            factors,
            scale_w=tuple(rounded.scale.tolist()),
            scale_d=scale_d,
            offset_d=offset_d,
        )
        weight = weight_from_matrices(layer, rounded.steps).to(torch.int8)
        largest = limit * rounded.scale * scale_d
        layer.bias.data.copy_(rounded.bias.clamp(-largest, largest))
        self._factors[name] = found
        self._operands[name] = IntegerOperands.of(layer, found, weight)
        return rounded
