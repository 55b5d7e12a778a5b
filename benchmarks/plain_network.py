"""EfficientNet-Lite0 rebuilt from textbook modules, for peers that cannot take it as packaged.

The package builds its convolutions from a subclass of `nn.Conv2d` that pads for itself, and calls
one ReLU6 twice in a block. Of the network as packaged, ModelOpt (torch) and torchao's PT2E flow
quantize only the last Linear, and optimum-quanto loses the padding and fails. Those peers get
this network instead: same weights, same outputs, plain `nn.Conv2d`, one ReLU6 a place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Residual(nn.Module):
    """`x + layers(x)`."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the input to what the layers make of it."""
        result: torch.Tensor = self.layers(x) + x
        return result


def plain(model: Any) -> nn.Sequential:
    """The network of `real_models.efficientnet_lite0()` as a Sequential of plain modules."""
    return nn.Sequential(
        *_convolution(model._conv_stem, model._bn0),
        nn.ReLU6(),
        *(_block(block) for block in model._blocks),
        *_convolution(model._conv_head, model._bn1),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        model._fc,
    ).eval()


def _block(block: Any) -> nn.Module:
    layers: list[nn.Module] = []
    if hasattr(block, "_expand_conv"):
        layers += [*_convolution(block._expand_conv, block._bn0), nn.ReLU6()]
    layers += [*_convolution(block._depthwise_conv, block._bn1), nn.ReLU6()]
    layers += _convolution(block._project_conv, block._bn2)
    shape = block._block_args
    has_skip = block.id_skip and shape.stride == 1 and shape.input_filters == shape.output_filters
    sequence = nn.Sequential(*layers)
    return Residual(sequence) if has_skip else sequence


def _convolution(packaged: Any, norm: nn.Module) -> list[nn.Module]:
    """The same convolution as a plain one; its padding inside it wherever it is symmetric."""
    padding = packaged.static_padding
    left, right, top, bottom = getattr(padding, "padding", (0, 0, 0, 0))
    symmetric = left == right and top == bottom
    convolution = nn.Conv2d(
        packaged.in_channels,
        packaged.out_channels,
        packaged.kernel_size,
        tuple(packaged.stride),
        padding=(top, left) if symmetric else 0,
        groups=packaged.groups,
        bias=packaged.bias is not None,
    )
    convolution.load_state_dict(packaged.state_dict())
    return [convolution, norm] if symmetric else [padding, convolution, norm]
