"""Fake quantization of a layer's input: observed first, then with learned clip values."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor, nn

from amct_pytorch.algorithms.solve import fp16_scale
from amct_pytorch.errors import CalibrationError
from amct_pytorch.formats import IntFormat
from amct_pytorch.formats.integer import SMALLEST_SCALE
from amct_pytorch.nn.fake_quant.learned_clip import learned_clip, observed_only
from amct_pytorch.nn.fake_quant.onnx_nodes import quantize_dequantize
from amct_pytorch.nn.fake_quant.real_values import RealValues, with_real_values
from amct_pytorch.nn.fake_quant.stored_start import Start

log = logging.getLogger("amct_pytorch")


class ActivationFakeQuant(RealValues):
    """Quantizes and dequantizes a tensor with a learned range (ULQ).

    In the first `batch_num` training forwards it lets the tensor through and observes it; the
    range with the least error over what was seen (IFMR, on all processes of torch.distributed
    together) is where the clip values start. Until then, an evaluating forward lets the tensor
    through too. Where the clip values are given, nothing is observed.

    Clip values that collapse, change sign or are not finite are put back to their last good
    ones in the next training forward, and count as these until then. `state_dict` holds all of
    the state, an unfinished observation included.

    Args:
        bits: 8 or 4.
        batch_num: training forwards to observe.
        fixed_min: whether `clip_min` is fixed at 0; None: it is if the least value observed
            is not below 0.
        clip_max: where `clip_max` starts, > 0; None: as observed.
        clip_min: where `clip_min` starts, <= 0; None: as observed.
        symmetric: whether the offset is fixed at 0. The range is that of `clip_max` then, and
            `clip_min` follows it.
        float16_scale: whether the scale is rounded to float16 (FORCE_FP16_QUANT).
        name: of the layer, for messages.

    Attributes:
        number_format: the integers.
        clip_max: parameter, upper end of the range.
        clip_min: parameter, lower end.
        good_clips: buffer [2], the last good clip_max and clip_min.
        fixed_min: None while it is not decided.
        ready: whether the clip values have started.
        seen: training forwards observed so far.
    """

    clip_max: nn.Parameter
    clip_min: nn.Parameter
    good_clips: Tensor

    def __init__(
        self,
        bits: int = 8,
        *,
        batch_num: int = 1,
        fixed_min: bool | None = None,
        clip_max: float | None = None,
        clip_min: float | None = None,
        symmetric: bool = False,
        float16_scale: bool = False,
        name: str = "",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.number_format = IntFormat(bits)
        self.batch_num = batch_num
        self.symmetric, self.float16_scale, self.name = symmetric, float16_scale, name
        if fixed_min is None and clip_min is not None:
            fixed_min = False
        self.fixed_min = fixed_min
        if fixed_min and not symmetric:
            clip_min = 0.0
        self._given = clip_max, clip_min
        self.seen = 0
        # The lower end of a symmetric range only widens the upper one.
        self.ready = clip_max is not None and (clip_min is not None or symmetric)
        self._start = Start()
        self._told = False  # of clip values that were put back
        high = 1.0 if clip_max is None else clip_max
        low = 0.0 if clip_min is None else clip_min
        if symmetric:
            high = max(high, -low * self.number_format.qmax / -self.number_format.qmin)
        self.clip_max = nn.Parameter(torch.tensor(high, dtype=torch.float32, device=device))
        self.clip_min = nn.Parameter(
            torch.tensor(low, dtype=torch.float32, device=device),
            requires_grad=not (fixed_min or symmetric),
        )
        self.register_buffer("good_clips", torch.tensor([high, low], device=device))

    def extra_repr(self) -> str:
        """Bits, the kind of range, and how far the start is."""
        state = "ready" if self.ready else f"seen {self.seen} of {self.batch_num} batches"
        fixed = "symmetric" if self.symmetric else f"fixed_min={self.fixed_min}"
        return f"bits={self.number_format.bits}, {fixed}, {state}"

    # What is kept here is no buffer: DistributedDataParallel would make all processes' equal.

    def get_extra_state(self) -> Tensor:
        """How far the start is, with what was observed if unfinished, as one tensor."""
        return self._start.packed(self.ready, self.seen, self.fixed_min)

    def set_extra_state(self, state: Tensor) -> None:
        """Takes over what `get_extra_state` returned."""
        self._start, self.ready, self.seen, self.fixed_min = Start.unpacked(state)

    def factors(self) -> tuple[float, int]:
        """Scale and offset as the record has them, which are those of `forward`.

        Raises:
            CalibrationError: the clip values have not started.
        """
        if not self.ready:
            raise CalibrationError(
                f"the range of {self._place()} is not known: {self.seen} of batch_num "
                f"{self.batch_num} training batches have run; run the others first"
            )
        return self._plain_factors(*self._plain_clips())

    def _place(self) -> str:
        return f"the input of layer {self.name!r}" if self.name else "a quantizer's input"

    def forward(self, x: Tensor) -> Tensor:
        """`x` on its grid, in its shape and dtype; or `x` while its range is being observed.

        In torch.onnx.export, QuantizeLinear and DequantizeLinear.

        Raises:
            CalibrationError: it is observed and holds NaN or infinity, or nothing at all; or it is
                exported before its range is known.
        """
        scale: float | Tensor
        offset: int | Tensor
        if torch.onnx.is_in_onnx_export():
            scale, offset = with_real_values(self.factors)
            return quantize_dequantize(x, scale, offset, self.number_format)
        if not self.ready:
            if torch.compiler.is_exporting():
                # The ONNX exporter tries again in a way in which is_in_onnx_export() is False, and
                # must not write a float layer then.
                raise CalibrationError("exported before its range is known")
            if not self.training:
                return x
            # What is observed is no graph to be compiled.
            compiling = torch.compiler.is_compiling()
            return torch.compiler.disable(self._observed)(x) if compiling else self._observed(x)
        if self._has_plain_numbers(x):
            high, low = self._plain_clips(put_back=self.training)
            scale, offset = self._plain_factors(high, low)
        else:
            scale, offset = self._tensor_factors()
        return learned_clip(
            x,
            self.clip_max,
            self.clip_min,
            self.number_format,
            scale,
            offset,
            symmetric=self.symmetric,
            fixed_min=bool(self.fixed_min),
        )

    def _has_plain_numbers(self, x: Tensor) -> bool:
        """Whether reading the clip values costs nothing: on other devices it would wait."""
        return (
            not torch.compiler.is_compiling()
            and x.device.type == "cpu"
            and self.clip_max.device.type == "cpu"
            and x.dtype != torch.float64
            and self.clip_max.dtype != torch.float64
        )

    # Observing, and where the clip values start.

    def _observed(self, x: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            try:
                self._start.histogram.update(x)
            except ValueError:
                raise CalibrationError(
                    f"{self._place()} holds NaN or infinity in training batch {self.seen + 1}; "
                    "check the data and the layers before this one"
                ) from None
            self.seen += 1
            if self.seen >= self.batch_num:
                self._begin()
        return observed_only(x, self.clip_max, self.clip_min)

    def _begin(self) -> None:
        histogram = self._start.merged()
        if histogram.total == 0:
            raise CalibrationError(f"no value of {self._place()} was observed: all was empty")
        if self.fixed_min is None:
            # The range reaches down to 0 in any case; its lower end must not rise above.
            self.fixed_min = histogram.low >= 0
        given_max, given_min = self._given
        high, low = self._start.search(
            histogram, self.number_format, symmetric=self.symmetric, from_zero=self.fixed_min
        )
        high = high if given_max is None else given_max
        low = low if given_min is None else given_min
        self.clip_max.copy_(torch.tensor(high))
        self.clip_min.copy_(torch.tensor(low))
        self.good_clips.copy_(torch.tensor([high, low]))
        self.ready = True
        self._start = Start()

    # From clip values to factors, by plain numbers and by tensors: equal to the last bit.

    def _plain_clips(self, *, put_back: bool = False) -> tuple[float, float]:
        """The clip values that count, clip_max and clip_min."""
        given = self.real("clip_max").item(), self.real("clip_min").item()
        high, low = self._tied(*given)
        good_high, good_low = self.real("good_clips").tolist()
        # The ends by themselves first: one that crosses zero does not undo the other.
        high = high if high >= 0 else good_high
        low = low if low <= 0 else good_low
        if not (math.isfinite(high - low) and high - low >= self._narrowest):
            high, low = good_high, good_low
        high, low = self._tied(high, low)
        if put_back:
            if (high, low) != given:
                self._put_back(given, (high, low))
            with torch.no_grad():
                self.good_clips.copy_(torch.tensor([high, low]))
        return high, low

    @property
    def _narrowest(self) -> float:
        return SMALLEST_SCALE * (self.number_format.qmax - self.number_format.qmin)

    def _tied(self, high: float, low: float) -> tuple[float, float]:
        if self.symmetric:
            return high, -high
        return high, 0.0 if self.fixed_min else low

    def _put_back(self, given: tuple[float, float], clips: tuple[float, float]) -> None:
        with torch.no_grad():
            self.clip_max.fill_(clips[0])
            self.clip_min.fill_(clips[1])
        # A lower end at zero keeps touching it, and a tied one follows.
        if clips[0] != given[0] and not self._told:
            self._told = True
            log.warning(
                "%s: its clip_max became %g in training and is put back to %g, now and whenever "
                "it happens again; a lower learning rate for it may help",
                self._place(),
                given[0],
                clips[0],
            )

    def _plain_factors(self, high: float, low: float) -> tuple[float, int]:
        scale, offset = self.number_format.range_factors(low, high, symmetric=self.symmetric)
        return (fp16_scale(scale) if self.float16_scale else scale), offset

    def _tied_tensors(self, high: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        if self.symmetric:
            return high, -high
        return high, torch.zeros_like(low) if self.fixed_min else low

    def _tensor_factors(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            high, low = self.clip_max.detach(), self.clip_min.detach()
            good_high, good_low = self.good_clips.unbind()
            high = torch.where(high >= 0, high, good_high)
            low = torch.where(low <= 0, low, good_low)
            clips = torch.stack(self._tied_tensors(high, low))
            width = clips[0] - clips[1]
            good = torch.isfinite(width) & (width >= self._narrowest)
            clips = torch.where(good, clips, self.good_clips)
            if self.training:
                self.clip_max.copy_(clips[0])
                self.clip_min.copy_(clips[1])
                self.good_clips.copy_(clips)
            scale, offset = self.number_format.factors(clips[1], clips[0], symmetric=self.symmetric)
            return (_fp16(scale) if self.float16_scale else scale), offset


def _fp16(scale: Tensor) -> Tensor:
    """See `fp16_scale`."""
    low, high = 2.0**-14, 65504.0
    root = scale.sqrt().clamp(low, high).half().float().square()
    return torch.where((scale >= low) & (scale <= high), scale.half().float(), root)
