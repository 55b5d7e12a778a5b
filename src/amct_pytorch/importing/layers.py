"""Nodes with constant weights as torch layers, so that the toolkit knows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from amct_pytorch.importing.registry import Operator
from amct_pytorch.importing.spatial import cropped, padded, window_pads

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class _Padding(nn.Module):
    """Pads as ONNX's ``pads`` or ``auto_pad`` say, then runs the convolution it is mixed into."""

    operator: Operator
    kernel_size: Any

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of the padded input."""
        begin, end = window_pads(self.operator, x.shape[2:], self.kernel_size)
        result: Tensor = super().forward(padded(x, begin, end))
        return result


class PaddedConv1d(_Padding, nn.Conv1d):
    """A convolution with another padding at either end."""


class PaddedConv2d(_Padding, nn.Conv2d):
    """A convolution with another padding at either end."""


class PaddedConv3d(_Padding, nn.Conv3d):
    """A convolution with another padding at either end."""


_PADDED = (PaddedConv1d, PaddedConv2d, PaddedConv3d)


class Normalization(_BatchNorm):
    """BatchNorm for any number of axes."""

    def _check_input_dim(self, input: Tensor) -> None:
        """None is wrong."""


Weights = Mapping[str, nn.Parameter]


def _module(built: nn.Module, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
    built.register_parameter("weight", weight)
    built.register_parameter("bias", bias)
    return built.eval()


def convolution(op: Operator, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module | None:
    """The layer of a Conv node, or None where torch has none."""
    number = weight.dim() - 2
    if not 1 <= number <= 3:
        return None
    pads = list(op.get("pads", [0] * 2 * number))
    automatic = op.get("auto_pad", "NOTSET")
    plain = automatic in ("NOTSET", "", "VALID") and pads[:number] == pads[number:]
    groups = op.get("group", 1)
    arguments: dict[str, Any] = {
        "kernel_size": tuple(weight.shape[2:]),
        "stride": tuple(op.get("strides", [1] * number)),
        "padding": tuple(pads[:number]) if plain and automatic != "VALID" else 0,
        "dilation": tuple(op.get("dilations", [1] * number)),
        "groups": groups,
        "bias": False,
        "device": "meta",
    }
    kind: Any = (_CONV if plain else _PADDED)[number - 1]
    built = kind(weight.shape[1] * groups, weight.shape[0], **arguments)
    if not plain:
        built.operator = op
    return _module(built, weight, bias)


class CroppedConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution with another padding at either end."""

    pads: Sequence[int]

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """The result without its padding."""
        return cropped(super().forward(x), self.pads)


def transposed_convolution(
    op: Operator, weight: nn.Parameter, bias: nn.Parameter | None
) -> nn.Module | None:
    """The layer of a ConvTranspose node, or None where torch has none."""
    number = weight.dim() - 2
    if not 1 <= number <= 3 or op.get("output_shape") is not None:
        return None
    if op.get("auto_pad", "NOTSET") not in ("NOTSET", ""):
        return None
    pads = list(op.get("pads", [0] * 2 * number))
    plain = pads[:number] == pads[number:]
    if not plain and number != 2:
        return None
    groups = op.get("group", 1)
    kind: Any = _CONV_TRANSPOSE[number - 1] if plain else CroppedConvTranspose2d
    built = kind(
        weight.shape[0],
        weight.shape[1] * groups,
        kernel_size=tuple(weight.shape[2:]),
        stride=tuple(op.get("strides", [1] * number)),
        padding=tuple(pads[:number]) if plain else 0,
        output_padding=tuple(op.get("output_padding", [0] * number)),
        groups=groups,
        bias=False,
        dilation=tuple(op.get("dilations", [1] * number)),
        device="meta",
    )
    if not plain:
        built.pads = pads
    return _module(built, weight, bias)


def linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
    """The layer of a Gemm or MatMul node; `weight` is [out, in]."""
    built = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    return _module(built, weight, bias)


def embedding(weight: nn.Parameter) -> nn.Module:
    """The layer of a Gather of rows of a constant matrix."""
    built = nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
    built.weight = weight
    return built.eval()


def batch_norm(
    op: Operator, scale: nn.Parameter, bias: nn.Parameter, mean: Tensor, variance: Tensor
) -> nn.Module:
    """The layer of a BatchNormalization node in inference form."""
    built = Normalization(scale.numel(), eps=op.get("epsilon", 1e-5), device="meta")
    built.running_mean, built.running_var = mean, variance
    built.num_batches_tracked = torch.tensor(0)
    return _module(built, scale, bias)


def average_pool(op: Operator) -> nn.Module | None:
    """The layer of an AveragePool node, or None where torch's differs."""
    kernel = op.get("kernel_shape")
    pads = op.get("pads", [0] * 2 * len(kernel))
    dilated = any(d != 1 for d in op.get("dilations", [1]))
    wide = any(2 * pad > size for pad, size in zip(pads, kernel, strict=False))
    if len(kernel) != 2 or pads[:2] != pads[2:] or dilated or wide:
        return None
    if op.get("auto_pad", "NOTSET") not in ("NOTSET", "", "VALID"):
        return None
    return nn.AvgPool2d(
        tuple(kernel),
        tuple(op.get("strides", [1, 1])),
        tuple(pads[:2]),
        bool(op.get("ceil_mode", 0)),
        bool(op.get("count_include_pad", 0)),
    ).eval()
