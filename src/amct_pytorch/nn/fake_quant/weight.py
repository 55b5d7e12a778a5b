"""Fake quantization of a layer's weight, by ARQ or with a learned scale."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from amct_pytorch.algorithms.arq import arq_scale
from amct_pytorch.formats import IntFormat
from amct_pytorch.formats.integer import SMALLEST_SCALE
from amct_pytorch.graph.weight_layout import WeightLayout
from amct_pytorch.nn.fake_quant.real_values import RealValues
from amct_pytorch.nn.fake_quant.straight_through import learned_scale, straight_through

ARQ: Literal["arq_retrain"] = "arq_retrain"
ULQ: Literal["ulq_retrain"] = "ulq_retrain"


class WeightFakeQuant(RealValues):
    """Quantizes and dequantizes a weight; the float weight itself stays the caller's.

    ``arq_retrain`` computes the scale from the weight in every forward, and gradients go
    straight through the rounding. ``ulq_retrain`` learns the largest weight magnitude
    `clip_max` of each scale, scale = clip_max / (2^(b-1) - 1): in the units of the weight it
    takes the weight's learning rate. It starts as ARQ's, in the first training forward.
    A learned value that is not finite or next to zero is put back to its last good one.

    Weights next to zero get ARQ's smallest scale, 2^-23; NaN weights stay NaN.

    Args:
        channels: output channels of the layer.
        layout: which weights belong to which output channel.
        bits: 8 or 4.
        algo: ``arq_retrain`` or ``ulq_retrain``.
        channel_wise: one scale for each output channel instead of one.

    Attributes:
        number_format: the integers.
        ready: False only for ``ulq_retrain`` before its first training forward.
        clip_max: parameter [channels] or [1], of ``ulq_retrain`` only.
        good_clip_max: buffer, its last good value.
    """

    clip_max: nn.Parameter
    good_clip_max: Tensor

    def __init__(
        self,
        channels: int,
        layout: WeightLayout,
        *,
        bits: int = 8,
        algo: Literal["arq_retrain", "ulq_retrain"] = ARQ,
        channel_wise: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.layout, self.algo, self.channel_wise = layout, algo, channel_wise
        self.number_format = IntFormat(bits)
        self.ready = algo == ARQ
        if algo == ULQ:
            ones = torch.ones(channels if channel_wise else 1, device=device)
            self.clip_max = nn.Parameter(ones)
            self.register_buffer("good_clip_max", ones.clone())

    def extra_repr(self) -> str:
        """Algorithm, bits and granularity."""
        return f"{self.algo}, bits={self.number_format.bits}, channel_wise={self.channel_wise}"

    def get_extra_state(self) -> Tensor:
        """Whether the learned scale has started, as a number."""
        return torch.tensor(float(self.ready))

    def set_extra_state(self, state: Tensor) -> None:
        """Takes over what `get_extra_state` returned."""
        self.ready = self.algo == ARQ or bool(state)

    def scale(self, weight: Tensor, least: Tensor | None = None) -> Tensor:
        """The scales as the record has them, float32 [channels] or [1].

        Args:
            weight: the layer's weight.
            least: scales that they must not be below, of the same shape; None: no such.
        """
        with torch.no_grad():
            if self.ready and self.algo == ULQ:
                scale = self._learned(self.real("clip_max"), self.real("good_clip_max"))
            else:
                scale = self._arq(weight)
            return _at_least(scale, least).float()

    def integers(self, weight: Tensor, least: Tensor | None = None) -> Tensor:
        """The weight's integers, int8, of its shape."""
        with torch.no_grad():
            scale = self.layout.along_channels(self.scale(weight, least), tuple(weight.shape))
            return self.number_format.quantize(weight.float(), scale).nan_to_num_(0).to(torch.int8)

    def forward(self, weight: Tensor, least: Tensor | None = None) -> Tensor:
        """The weight on its grid, in its shape and dtype.

        Args:
            weight: the layer's weight.
            least: see `scale`.
        """
        if self.algo == ULQ and self.training:
            self._put_back(weight)
        if self.algo == ARQ:
            scale = _at_least(self._arq(weight), least)
            return straight_through(weight, self._along(scale, weight), self.number_format)
        if not self.ready:
            return straight_through(
                weight, self._along(self.scale(weight, least), weight), self.number_format
            )
        scale = _at_least(self._learned(self.clip_max, self.good_clip_max), least)
        return learned_scale(weight, self._along(scale, weight), self.number_format)

    def _along(self, scale: Tensor, weight: Tensor) -> Tensor:
        return self.layout.along_channels(scale, tuple(weight.shape))

    def _learned(self, clip_max: Tensor, good: Tensor) -> Tensor:
        """With a gradient of `clip_max`."""
        return torch.where(self._good(clip_max), clip_max, good) / self.number_format.qmax

    def _arq(self, weight: Tensor) -> Tensor:
        return arq_scale(weight, self.number_format, self.layout, channel_wise=self.channel_wise)

    def _good(self, clip_max: Tensor) -> Tensor:
        smallest = SMALLEST_SCALE * self.number_format.qmax
        return torch.isfinite(clip_max) & (clip_max.detach() >= smallest)

    @torch.no_grad()
    def _put_back(self, weight: Tensor) -> None:
        """Starts the learned values, or replaces those that went astray."""
        if not self.ready:
            self.clip_max.copy_(self._arq(weight) * self.number_format.qmax)
            self.ready = True
        self.clip_max.copy_(
            torch.where(self._good(self.clip_max), self.clip_max, self.good_clip_max)
        )
        self.good_clip_max.copy_(self.clip_max)


def _at_least(scale: Tensor, least: Tensor | None) -> Tensor:
    return scale if least is None else torch.maximum(scale, least.to(scale))
