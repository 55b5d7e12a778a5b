"""What the built-in algorithms for Linear share: calibration from first batch to simulation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from amct_pytorch.algorithms.finite import is_finite
from amct_pytorch.config.low_bit import LayerRequest
from amct_pytorch.errors import CalibrationError, ModelError
from amct_pytorch.low_bit.base_module import BaseQuantizeModule
from amct_pytorch.low_bit.deploy_conv import LowBitConv2d
from amct_pytorch.low_bit.deploy_linear import LowBitLinear
from amct_pytorch.low_bit.solution import LinearSolution
from amct_pytorch.observers.statistics import Agreement, sample

# About how many tokens the error of a layer is measured on where not on all.
MEASURED_TOKENS = 1024


class LinearQuantizeModule(BaseQuantizeModule):
    """A Linear under calibration; a subclass says what it collects and how it solves.

    To add an algorithm, override `solve`, and `observe` if it looks at inputs; give its options
    as the pydantic model `Options`; and add a line to `low_bit.built_in`::

        class MyLinear(LinearQuantizeModule):
            def observe(self, x):             # float [..., K], once a batch, no autograd
                self.largest = max(self.largest, x.abs().max())

            def solve(self) -> LinearSolution:  # once, after the last `observe`
                weights = self.request.weights
                return LinearSolution(QuantizedTensor.nearest(
                    self.weight, weights.format, weights.granularity,
                    symmetric=weights.symmetric))

    Attributes:
        layer_class: of the layers it replaces; ``torch.nn.Conv2d`` for a convolution, whose
            `deployed` must then be overridden.
        request: what the config asks for this layer.
        ori_module: the float layer; None after solving, so that its memory is free.
        deploy: the quantized layer; None before solving.
        quantized_at_once: the call that completes calibration returns the simulated quantized
            output, for the layers behind to be calibrated on; its error is then measured on
            some of the tokens.
    """

    quantized_at_once = False
    layer_class: ClassVar[type[nn.Module]] = nn.Linear

    def __init__(
        self, ori_module: nn.Module, layer_name: str, quant_config: Mapping[str, Any]
    ) -> None:
        super().__init__(ori_module, layer_name, quant_config)
        if not isinstance(ori_module, self.layer_class):
            raise ModelError(
                f"layer {layer_name!r} is a {type(ori_module).__module__}."
                f"{type(ori_module).__name__}; the built-in algorithms need a torch.nn."
                f"{self.layer_class.__name__}. Add it to skip_layers, or register an algorithm "
                "for its class"
            )
        self.request = LayerRequest.from_dict(quant_config)
        assert isinstance(ori_module, nn.Linear | nn.Conv2d)
        self.ori_module: nn.Linear | nn.Conv2d | None = ori_module
        self.deploy: LowBitLinear | LowBitConv2d | None = None
        self.in_features, self.out_features = ori_module.weight.shape[1], len(ori_module.weight)
        self.ori_module_type = self.layer_class.__name__
        self.wts_type = self.request.weights.type
        self.act_type = None if self.request.inputs is None else self.request.inputs.type
        self.group_size = self.request.weights.group_size

    @property
    def weight(self) -> Tensor:
        """The float weight [N, K]; after solving, what the codes stand for."""
        if self.ori_module is not None:
            return self.ori_module.weight.detach()
        assert self.deploy is not None
        return self.deploy.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias, float [N]."""
        if self.ori_module is not None:
            return self.ori_module.bias
        assert self.deploy is not None
        return self.deploy.float_bias()

    def observe(self, x: Tensor) -> None:
        """Takes in one batch of float inputs [..., K]."""

    def solve(self) -> LinearSolution:
        """The quantized layer, once all batches have been observed."""
        raise NotImplementedError

    def deployed(
        self, solution: LinearSolution, bias: Tensor | None
    ) -> LowBitLinear | LowBitConv2d:
        """The layer of a solution, with the reference as its kernel."""
        layer = LowBitLinear.of(solution, bias, self.weight.dtype)
        layer.backend = "reference"
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """The float output while calibrating, then the simulated quantized output."""
        if self.ori_module is None:
            assert self.deploy is not None
            output: Tensor = self.deploy(x)
            return output
        if not is_finite(x):
            raise CalibrationError(
                f"the input of layer {self.layer_name!r} holds NaN or infinity in calibration "
                f"batch {self.batches_seen + 1}; check the calibration data and the layers "
                "before this one"
            )
        # Layers tell by the tensor itself whether they share an input: none is made of it here.
        if self.in_last_batch and self.quantized_at_once:
            with torch.no_grad():
                self.observe(x)
                tokens = some_tokens(x)
                simulated: Tensor = self._finish(tokens, self.ori_module(tokens))(x)
                return simulated
        y: Tensor = self.ori_module(x)
        with torch.no_grad():
            self.observe(x)
            if self.in_last_batch:
                self.complete(x.detach(), y.detach())
        return y

    def complete(self, x: Tensor, y: Tensor) -> None:
        """Called in the last batch, with its input and output, after `observe`."""
        self._finish(x, y)

    def _finish(self, x: Tensor, y: Tensor) -> LowBitLinear | LowBitConv2d:
        """Solves, and measures what that did to the output of the last batch."""
        return self.take(self.solve(), x, y)

    def take(self, solution: LinearSolution, x: Tensor, y: Tensor) -> LowBitLinear | LowBitConv2d:
        """Becomes the quantized layer of a solution; `y` is what it should give for `x`."""
        assert self.ori_module is not None
        self.scale_w, self.offset_w = solution.weight.scale, solution.weight.offset
        if solution.inputs is not None:
            self.scale_d, self.offset_d = solution.inputs.scale, solution.inputs.offset
        self.scale, self.clip_max = solution.divisor, solution.clip_max
        bias = self.ori_module.bias if solution.bias is None else solution.bias
        self.deploy = self.deployed(solution, bias)
        agreement = Agreement.between(sample(y), sample(self.deploy(x)))
        self.outcome.notes.extend([*solution.notes, *self.deploy.notes])
        self.outcome.measured(agreement, self.deploy.stored_bytes())
        self.ori_module = None
        return self.deploy

    def extra_repr(self) -> str:
        """Formats, and how far calibration is."""
        kind = self.request.weights.strategy
        inputs = "" if self.act_type is None else f", inputs {self.act_type}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"weights {self.wts_type} by {kind}{inputs}, "
            f"{self.batches_seen} of {self.batch_num} batches seen"
        )


def some_tokens(x: Tensor, number: int = MEASURED_TOKENS) -> Tensor:
    """At most twice that `number` of tokens of inputs [..., K] at even distances, [tokens, K]."""
    tokens = x.detach().reshape(-1, x.shape[-1])
    return tokens[:: max(1, len(tokens) // number)]
