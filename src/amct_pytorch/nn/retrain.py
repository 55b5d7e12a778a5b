"""Layers that are trained with their quantization in place.

The user's own module keeps its weights, which are what the optimizer changes, and its forward;
its one convolution or linear call is answered on fake-quantized operands. A BatchNorm behind the
layer is trained unfused, while the weight that is quantized is the one that will be deployed,
with the BatchNorm folded in by its running statistics, and divided back afterwards (Krishnamoorthi,
arXiv 1806.08342, section 3.2.2).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from amct_pytorch.algorithms.arq import bias_limit, floored_for_bias
from amct_pytorch.errors import ModelError
from amct_pytorch.formats import IntFormat
from amct_pytorch.formats.integer import SMALLEST_SCALE
from amct_pytorch.graph.layers import LAYER_KINDS, LayerKind
from amct_pytorch.graph.look import ModelGraph
from amct_pytorch.graph.readers import layers_read_in_float
from amct_pytorch.nn.fake_quant.activation import ActivationFakeQuant
from amct_pytorch.nn.fake_quant.learned_clip import observed_only
from amct_pytorch.nn.fake_quant.weight import ARQ, WeightFakeQuant
from amct_pytorch.nn.fuse_norm import fuse_norm
from amct_pytorch.nn.intercept import LayerCall
from amct_pytorch.nn.simulate import IntegerOperands, without_autograd
from amct_pytorch.nn.trained_norm import TrainedNorm
from amct_pytorch.nn.wrapped import LayerStandIn, replace_modules
from amct_pytorch.observers.histogram import Histogram
from amct_pytorch.processes import world_size
from amct_pytorch.record.factors import FORCE_FP16, LayerFactors

# Channels of a BatchNorm whose factor is smaller than this share of the largest are next to
# dead: a weight multiplied by it and divided again would lose its digits.
SMALLEST_SHARE = 2.0**-20


@dataclass(frozen=True)
class TrainedQuantization:
    """How one layer is quantized while it is trained.

    Attributes:
        activation_bits: of its input.
        weight_bits: of its weights.
        weight_algorithm: `ARQ` or `ULQ`.
        channel_wise: whether each output channel has a weight scale of its own.
        batch_num: training batches that the input's range comes from.
        clip_max: upper end of the range; None: it is found.
        clip_min: lower end; None likewise.
        fixed_min: whether the lower end stays 0; None: the data decide.
        symmetric: whether the input has no zero point.
        packed: whether four-bit weights can be deployed two in a byte.
        fakequant_precision_mode: ``DEFAULT`` or ``FORCE_FP16_QUANT``.
    """

    activation_bits: int = 8
    weight_bits: int = 8
    weight_algorithm: Literal["arq_retrain", "ulq_retrain"] = ARQ
    channel_wise: bool = True
    batch_num: int = 1
    clip_max: float | None = None
    clip_min: float | None = None
    fixed_min: bool | None = None
    symmetric: bool = False
    packed: bool = True
    fakequant_precision_mode: str = "DEFAULT"


class RetrainLayer(LayerStandIn):
    """Stands in for a layer and trains its quantization.

    In training, the first `batch_num` batches run in float and are observed. After them the
    input is fake-quantized with learned clip values, and the weight as ARQ or ULQ has it. In
    evaluation without gradients the layer computes what will be deployed: integers, summed
    and rescaled, the BatchNorm folded in and the bias rounded.

    Args:
        name: the layer's dotted path.
        kind: its row of the layer table.
        layer: the user's module, whose parameters are trained.
        groups: groups of a convolution.
        weight_shape: shape of its call's weight.
        settings: how it is quantized.
        norm: the BatchNorm behind it and behind nothing else; None: there is none.
        with_outputs: whether the range of its output is wanted too.

    Attributes:
        found: factors as of the last evaluation pass through the layer.
        outputs: what it returned in evaluation since it was last trained or got other factors (a
            checkpoint was loaded, say), where that is wanted; no part of the state dict.
    """

    def __init__(
        self,
        name: str,
        kind: LayerKind,
        layer: nn.Module,
        groups: int,
        weight_shape: tuple[int, ...],
        settings: TrainedQuantization,
        norm: TrainedNorm | None,
        *,
        with_outputs: bool = False,
    ) -> None:
        super().__init__(kind, layer)
        self.name = name
        self.layout = kind.layout(groups)
        self.settings = settings
        self.found: LayerFactors | None = None
        self.outputs = Histogram() if with_outputs else None
        self._observed_with: LayerFactors | None = None
        self._in_float = False  # the present forward, also when it is run again
        # In a tuple, so that it is no submodule a second time.
        self._norm = (norm,)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        self.input_quantizer = ActivationFakeQuant(
            bits=settings.activation_bits,
            batch_num=settings.batch_num,
            clip_max=settings.clip_max,
            clip_min=settings.clip_min,
            fixed_min=settings.fixed_min,
            symmetric=settings.symmetric,
            float16_scale=settings.fakequant_precision_mode == FORCE_FP16,
            name=name,
            device=weight.device,
        )
        self.weight_quantizer = WeightFakeQuant(
            self.layout.channels(weight_shape),
            self.layout,
            bits=settings.weight_bits,
            algo=settings.weight_algorithm,
            channel_wise=settings.channel_wise,
            device=weight.device,
        )
        for module in (self, self.input_quantizer, self.weight_quantizer):
            module.training = layer.training

    @property
    def norm(self) -> TrainedNorm | None:
        """The BatchNorm behind the layer."""
        return self._norm[0]

    def quantizers(self) -> tuple[ActivationFakeQuant, WeightFakeQuant]:
        """That of the input and that of the weight."""
        return self.input_quantizer, self.weight_quantizer

    def answer(self, call: LayerCall) -> Tensor:
        """The call on quantized operands; in float while ranges are being found."""
        assert call.weight is not None
        if self.norm is not None:
            self.norm.folded = False
        if not self.training:
            weight, bias, self.found = self.deployed(call.weight, call.bias)
            if self.found.complete and self._evaluates():
                if self.norm is not None:
                    self.norm.folded = True
                y = self.integer_operands(weight, bias, self.found).run(self, call)
                self._observe_output(y, self.found)
                return y
        elif self.outputs is not None and self.outputs.total:
            self.outputs = Histogram()
        again = _runs_again()
        if not again:
            self._in_float = not self.input_quantizer.ready
        if self._in_float:
            quantizer = self.input_quantizer
            if again:
                x = observed_only(call.x, quantizer.clip_max, quantizer.clip_min)
            else:
                x = quantizer(call.x)
            y = call.run(x, call.weight, call.bias)
            return _with_part_of(y, self.weight_quantizer)
        x = self.input_quantizer(call.x)
        return call.run(x, self.fake_quantized(call.weight), call.bias)

    def _evaluates(self) -> bool:
        if torch.is_grad_enabled():
            return False
        return self.norm is None or not self.norm.norm.training

    @torch.compiler.disable
    @without_autograd
    def _observe_output(self, y: Tensor, factors: LayerFactors) -> None:
        if self.outputs is not None:
            if factors != self._observed_with:
                self.outputs, self._observed_with = Histogram(), factors
            # Who evaluates on NaN sees it in the result; a range it does not make.
            with contextlib.suppress(ValueError):
                self.outputs.update(y)

    def fake_quantized(self, weight: Tensor) -> Tensor:
        """The weight on the grid that it will be deployed on, in the units of the layer itself.

        Args:
            weight: the weight operand of the layer's call.
        """
        factor = self._norm_factor()
        if factor is not None and self.settings.channel_wise and factor.device.type == "cpu":
            # Reading costs nothing here, and multiplying by ones would.
            factor = None if bool((factor >= 0).all()) else factor
        if factor is None:
            quantized: Tensor = self.weight_quantizer(weight)
        else:
            along = self.layout.along_channels(self._folded_by(factor), tuple(weight.shape))
            along = along.to(weight.dtype)
            quantized = self.weight_quantizer(weight * along) / along
        return quantized

    @torch.no_grad()
    def deployed(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, LayerFactors]:
        """What is deployed of the layer: weight and bias with the BatchNorm folded in, factors.

        Args:
            weight: the weight operand of the layer's call.
            bias: its bias operand.
        """
        fused, fused_bias = weight.detach(), None if bias is None else bias.detach()
        factor = self._norm_factor()
        folded_by = None if factor is None else self._folded_by(factor)
        if self.norm is not None:
            fused, fused_bias = fuse_norm(fused, fused_bias, self.norm.norm, self.layout)
        if fused_bias is None:
            fused_bias = fused.new_zeros(self.layout.channels(fused.shape))
        if factor is None or folded_by is None:
            scale_w = self.weight_quantizer.scale(weight)
        else:
            along = self.layout.along_channels(folded_by, tuple(weight.shape))
            scale_w = self.weight_quantizer.scale(weight * along.to(weight.dtype))
            if self.settings.channel_wise:
                # Scales of channels are found without the BatchNorm, and grow with it.
                scale_w = scale_w * factor.abs()
        scale_w = scale_w.cpu().clamp(min=SMALLEST_SCALE)
        if not self.input_quantizer.ready:
            return fused, fused_bias, self._factors(scale_w, None, 0)
        scale_d, offset_d = self.input_quantizer.factors()
        scale_w = floored_for_bias(scale_w, scale_d, fused_bias.cpu(), bias_limit(scale_w))
        return fused, fused_bias, self._factors(scale_w, scale_d, offset_d)

    def _factors(self, scale_w: Tensor, scale_d: float | None, offset_d: int) -> LayerFactors:
        settings = self.settings
        return LayerFactors(
            scale_w=tuple(scale_w.tolist()),
            scale_d=scale_d,
            offset_d=offset_d,
            weight_bits=settings.weight_bits if settings.packed else 8,
            activation_bits=settings.activation_bits,
            fakequant_precision_mode=settings.fakequant_precision_mode,
        )

    def integers(self, weight: Tensor, factors: LayerFactors) -> Tensor:
        """The integers, int8, of a weight with the BatchNorm folded in."""
        scale = torch.tensor(factors.scale_w).to(weight.device)
        along = self.layout.along_channels(scale, tuple(weight.shape))
        # Trained with four bits, they are four-bit numbers also where a byte holds each.
        grid = IntFormat(self.settings.weight_bits)
        return grid.quantize(weight.detach().float(), along).to(torch.int8)

    def integer_operands(
        self, weight: Tensor, bias: Tensor, factors: LayerFactors
    ) -> IntegerOperands:
        """What the layer computes with when it is deployed; see `deployed`."""
        integers = self.integers(weight, factors)
        return IntegerOperands.on(weight, bias, factors, self.layout, integer_weight=integers)

    def _norm_factor(self) -> Tensor | None:
        """What the BatchNorm multiplies each channel by, float32, by its running statistics."""
        if self.norm is None:
            return None
        norm = self.norm.norm
        assert norm.running_var is not None
        with torch.no_grad():
            factor = torch.rsqrt(norm.running_var.float() + norm.eps)
            return factor if norm.weight is None else factor * norm.weight.detach().float()

    def _folded_by(self, factor: Tensor) -> Tensor:
        """What weights are multiplied by before they are quantized, and divided by after.

        Where each channel has a scale of its own, that scale takes the size of the factor, and
        only its sign matters: the grid has one step more below zero than above. A channel that
        the BatchNorm multiplies by zero (many begin so) can then be trained.
        """
        if self.settings.channel_wise:
            return torch.where(factor < 0, -torch.ones_like(factor), torch.ones_like(factor))
        size = factor.abs()
        size = torch.maximum(size, SMALLEST_SHARE * size.max())
        size = torch.where(size == 0, torch.ones_like(size), size)
        return torch.where(factor < 0, -size, size)

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise ModelError(
            f"layer {self.name!r} is trained with its quantization, which torch.nn.DataParallel "
            "cannot do: what each copy learns and observes is thrown away. Start one process a "
            "device with torchrun and use torch.nn.parallel.DistributedDataParallel"
        )


def _runs_again() -> bool:
    """Whether a forward runs within a backward: torch.utils.checkpoint does it once more.

    What it did the first time was seen then, and has to be done the same way again.
    """
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)


def _with_part_of(y: Tensor, module: nn.Module) -> Tensor:
    """`y`, with zero gradients for the module's parameters.

    DistributedDataParallel waits for a gradient of every parameter.
    """
    if world_size() > 1:
        for parameter in module.parameters():
            y = y + (0 * parameter.sum()).to(y.dtype)
    return y


def retrain_layers(model: nn.Module) -> dict[str, RetrainLayer]:
    """Every `RetrainLayer` in `model` by layer name, in module order."""
    return {module.name: module for module in model.modules() if isinstance(module, RetrainLayer)}


def instrument_for_training(
    model: nn.Module,
    graph: ModelGraph,
    settings: Mapping[str, TrainedQuantization],
) -> None:
    """Puts a `RetrainLayer` in the place of each named layer of `model`, in place.

    Args:
        model: a copy of the model that was looked at, in the modes that it is to have.
        graph: what the look found.
        settings: by name of the layers to quantize, all quantizable.

    Raises:
        ModelError: a weight, bias or BatchNorm holds NaN or infinity.
    """
    layers = {layer.name: layer for layer in graph.layers}
    fused = {name: norm for name, norm in graph.fusable_norms.items() if name in settings}
    with_outputs = layers_read_in_float(graph, settings, fused)
    replacements: dict[nn.Module, nn.Module] = {}
    for name, wanted in settings.items():
        module = model.get_submodule(name)
        _check_finite(name, module)
        norm = None
        norm_name = fused.get(name)
        if norm_name is not None:
            inner = model.get_submodule(norm_name)
            assert isinstance(inner, _BatchNorm)
            _check_finite(norm_name, inner)
            norm = TrainedNorm(inner)
            norm.training = inner.training
            replacements[inner] = norm
        layer = layers[name]
        replacements[module] = RetrainLayer(
            name,
            LAYER_KINDS[layer.kind],
            module,
            layer.groups,
            layer.weight_shape,
            wanted,
            norm,
            with_outputs=name in with_outputs,
        )
    replace_modules(model, replacements)


def without_quantization(model: nn.Module) -> None:
    """Puts the user's own modules back, with what they have learned, in place."""
    replace_modules(
        model,
        {
            module: module.layer
            for module in model.modules()
            if isinstance(module, RetrainLayer | TrainedNorm)
        },
    )


def _check_finite(name: str, module: nn.Module) -> None:
    held = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    for what, tensor in held:
        if not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()):
            continue
        number = int((~torch.isfinite(tensor)).sum())
        raise ModelError(
            f"the {what} of {name!r} holds {number} values that are NaN or infinite; load a sound "
            "checkpoint, or skip the layer"
        )
