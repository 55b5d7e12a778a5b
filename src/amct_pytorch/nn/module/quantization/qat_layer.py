"""What every quantization-aware operator has in common."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from amct_pytorch.config.qat_operator import OperatorConfig, operator_config
from amct_pytorch.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    ModelError,
    shown,
)
from amct_pytorch.graph.layers import LayerKind
from amct_pytorch.nn.fake_quant import ActivationFakeQuant, WeightFakeQuant
from amct_pytorch.nn.fake_quant.onnx_nodes import dequantize
from amct_pytorch.nn.fake_quant.real_values import RealValues, with_real_values
from amct_pytorch.record.factors import LayerFactors

Operator = TypeVar("Operator", bound="QatLayer")


class QatLayer(RealValues):
    """Mixed in before a torch layer: input and weight are quantized and dequantized first.

    The layer's own `weight` and `bias` stay float and are what is trained; they have the
    names that they have in the torch layer. Input and weight are quantized alike in training
    and evaluating mode. The input's range starts from the first `batch_num` training batches,
    in which the input is not quantized yet.

    Attributes:
        config: the checked config.
        input_quantizer: None with `retrain_enable` False.
        weight_quantizer: None with `retrain_enable` False.
    """

    weight: Tensor
    bias: Any  # Tensor or None
    input_quantizer: ActivationFakeQuant | None
    weight_quantizer: WeightFakeQuant | None

    # Set by each operator.
    KIND: ClassVar[LayerKind]

    def _begin(self, config: object) -> None:
        """Puts the quantizers in, at the end of an operator's `__init__`."""
        self.config: OperatorConfig = operator_config(
            config, type(self).__name__, channel_wise=self.KIND.channel_wise
        )
        limit = self.KIND.limits(self)
        if limit is not None:
            raise ArgumentValueError(f"{type(self).__name__}: {limit}")
        self.input_quantizer = self.weight_quantizer = None
        if not self.config.retrain_enable:
            return
        data, weights = self.config.retrain_data_config, self.config.retrain_weight_config
        self.input_quantizer = ActivationFakeQuant(
            data.bits,
            batch_num=data.batch_num,
            fixed_min=data.fixed_min,
            clip_max=data.clip_max,
            clip_min=data.clip_min,
            symmetric=self.KIND.symmetric_inputs,
            device=self.weight.device,
        )
        layout = self.KIND.layout(getattr(self, "groups", 1))
        wise = self.KIND.channel_wise if weights.channel_wise is None else weights.channel_wise
        self.weight_quantizer = WeightFakeQuant(
            layout.channels(tuple(self.weight.shape)),
            layout,
            bits=weights.bits,
            algo=weights.weights_retrain_algo,
            channel_wise=wise,
            device=self.weight.device,
        )

    def extra_repr(self) -> str:
        """The torch layer's own, and whether it is quantized."""
        own = super().extra_repr()
        return own if self.config.retrain_enable else f"{own}, retrain_enable=False"

    def factors(self) -> LayerFactors:
        """Scales and offset as a record has them: what the exported operator computes with.

        Raises:
            CalibrationError: the input's range is not known yet.
            ModelError: the operator is not quantized.
        """
        if self.input_quantizer is None or self.weight_quantizer is None:
            raise ModelError(f"{type(self).__name__} has retrain_enable False and no factors")
        scale_d, offset_d = self.input_quantizer.factors()
        scale_w = self.weight_quantizer.scale(self.weight)
        return LayerFactors(
            scale_w=tuple(scale_w.tolist()),
            scale_d=scale_d,
            offset_d=offset_d,
            weight_bits=self.weight_quantizer.number_format.bits,
            activation_bits=self.input_quantizer.number_format.bits,
        )

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input and weight to compute with.

        Raises:
            ArgumentValueError: the input has another number of dimensions than allowed.
            CalibrationError: see `ActivationFakeQuant.forward`.
        """
        low, high = self.KIND.input_ranks
        if not low <= x.dim() <= high:
            allowed = f"{low}" if low == high else f"{low} to {high}"
            raise ArgumentValueError(
                f"{type(self).__name__}: the input has {x.dim()} dimensions "
                f"{list(x.shape)}; allowed: {allowed}"
            )
        if self.input_quantizer is None or self.weight_quantizer is None:
            return x, self.weight
        if not torch.onnx.is_in_onnx_export():
            return self.input_quantizer(x), self.weight_quantizer(self.weight)
        if "weight" not in self._parameters:
            raise ModelError(
                f"{type(self).__name__}: its weight is parametrized; take the parametrization "
                "away with torch.nn.utils.parametrize.remove_parametrizations before the export"
            )
        quantizer, weight = self.weight_quantizer, self.real("weight")
        codes, scale = with_real_values(
            lambda: (quantizer.integers(weight), quantizer.scale(weight))
        )
        return self.input_quantizer(x), dequantize(codes, scale, quantizer.layout)

    @classmethod
    def _taken_over(cls, mod: nn.Module, keys: tuple[str, ...], config: object) -> Any:
        """A new operator with the weight, bias, device and mode of `mod`.

        Args:
            mod: the float layer.
            keys: its attributes that the constructor takes as arguments.
            config: the operator's config.

        Raises:
            ArgumentTypeError: `mod` is of another class, or has a forward of its own.
            ArgumentValueError: the operator does not allow what `mod` has.
        """
        name, wanted, float_class = cls.__name__, cls.KIND.name, cls.KIND.module_class
        if not isinstance(mod, float_class) or type(mod).forward is not float_class.forward:
            kind = type(mod).__name__
            why = ", whose forward is its own" if isinstance(mod, float_class) else ""
            raise ArgumentTypeError(f"{name}.from_float: mod is a {kind}{why}; allowed: {wanted}")
        uninitialized = isinstance(mod.weight, nn.UninitializedParameter)
        if uninitialized or nn.utils.parametrize.is_parametrized(mod):
            raise ArgumentValueError(
                f"{name}.from_float: the weight of mod is parametrized or has no values yet; "
                f"allowed: a plain {wanted}"
            )
        source = dict(mod.named_parameters(recurse=False))
        weight = source["weight"]
        # On the meta device: no random numbers are drawn for weights that are replaced.
        new: Any = cls(
            **{key: getattr(mod, key) for key in keys},
            bias="bias" in source,
            device="meta",
            dtype=weight.dtype,
            config=config,
        )
        for key, parameter in source.items():
            copied = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            setattr(new, key, copied)
        new._begin(config)  # where the weight is now
        return new.train(mod.training)


def check_arguments(operator: str, dtype: object, padding_mode: object = "zeros") -> None:
    """Refuses what no quantization-aware operator allows.

    Raises:
        ArgumentValueError: `dtype` or `padding_mode` is not allowed.
    """
    if (torch.get_default_dtype() if dtype is None else dtype) != torch.float32:
        found = torch.get_default_dtype() if dtype is None else dtype
        raise ArgumentValueError(f"{operator}: dtype is {found}; allowed: torch.float32")
    if padding_mode != "zeros":
        raise ArgumentValueError(
            f"{operator}: padding_mode is {shown(padding_mode)}; allowed: 'zeros'"
        )
