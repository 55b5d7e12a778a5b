"""OFMR for Linear and Conv2d."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

from amct_pytorch.algorithms.ofmr import solve_ofmr
from amct_pytorch.algorithms.padding import unpadded
from amct_pytorch.errors import CalibrationError, ModelError
from amct_pytorch.formats import fake_quantize
from amct_pytorch.low_bit.deploy_conv import LowBitConv2d
from amct_pytorch.low_bit.linear import LinearQuantizeModule
from amct_pytorch.low_bit.minmax import NoOptions, RunningRange, input_quantizer
from amct_pytorch.low_bit.solution import InputQuantizer, LinearSolution, QuantizedTensor
from amct_pytorch.observers.input_sample import InputSample


class OfmrLinear(LinearQuantizeModule):
    """Linear by OFMR: output errors are measured on a sample of tokens of all batches."""

    Options = NoOptions
    item_dims = 1

    def __init__(
        self, ori_module: nn.Module, layer_name: str, quant_config: Mapping[str, Any]
    ) -> None:
        super().__init__(ori_module, layer_name, quant_config)
        self._range = RunningRange()
        self._sample = InputSample(self.batch_num, self.item_dims)

    def observe(self, x: Tensor) -> None:
        """Widens the range and keeps some inputs; padding does not count."""
        counted = self.counted(x)
        self._range.add(counted)
        self._sample.add(counted)

    def counted(self, x: Tensor) -> Tensor:
        """The inputs without tokens under a `padding_mask`."""
        return unpadded(x)

    def operator(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's output without bias, channels last."""
        return linear(x, weight)

    def solve(self) -> LinearSolution:
        """Inputs and weights by the scales with the least output error."""
        samples = self._sample.items()
        if not samples:
            raise CalibrationError(
                f"the input of layer {self.layer_name!r} was empty (0 values) in every "
                "calibration batch"
            )
        weights, inputs = self.request.weights, self.request.inputs
        quantizer = None if inputs is None else input_quantizer(inputs, self._range)

        def quantized(x: Tensor, scale: Tensor) -> Tensor:
            assert quantizer is not None
            if quantizer.dynamic:
                return quantizer.simulate(x)
            return fake_quantize(x, scale, None, quantizer.fmt, quantizer.granularity)

        found = solve_ofmr(
            self.weight.float(),
            samples,
            self.operator,
            weights.format,
            weights.granularity,
            quantize_input=None if quantizer is None else quantized,
            input_scale=None if quantizer is None else quantizer.scale,
        )
        if quantizer is not None:
            quantizer = InputQuantizer(quantizer.fmt, quantizer.granularity, found.input_scale)
        errors = f"{found.error:.2g} for {found.error_extremes:.2g} by extremes"
        return LinearSolution(
            QuantizedTensor.nearest(
                self.weight, weights.format, weights.granularity, scale=found.weight_scale
            ),
            quantizer,
            notes=(f"relative output error {errors}",),
        )


class OfmrConv2d(OfmrLinear):
    """Conv2d by OFMR: output errors are measured on a sample of images of all batches."""

    layer_class = nn.Conv2d
    item_dims = 3

    def __init__(
        self, ori_module: nn.Module, layer_name: str, quant_config: Mapping[str, Any]
    ) -> None:
        super().__init__(ori_module, layer_name, quant_config)
        mode = getattr(ori_module, "padding_mode", "zeros")
        if mode != "zeros":
            raise ModelError(
                f"layer {layer_name!r} has padding_mode {mode!r}; allowed is 'zeros'. Add it to "
                "skip_layers"
            )

    def operator(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's output without bias, channels last."""
        assert isinstance(self.ori_module, nn.Conv2d)
        y: Tensor = self.ori_module._conv_forward(x, weight, None)
        return y.movedim(1, -1)

    def counted(self, x: Tensor) -> Tensor:
        """All of them: images have no padding mask."""
        return x

    def deployed(self, solution: LinearSolution, bias: Tensor | None) -> LowBitConv2d:
        """The convolution with its weight as codes."""
        assert isinstance(self.ori_module, nn.Conv2d)
        return LowBitConv2d.of(solution, self.ori_module, bias)
