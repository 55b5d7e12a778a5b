"""What is observed of one cached tensor, and the factors that follow from it."""

from __future__ import annotations

import torch
from torch import Tensor

from amct_pytorch.config.kv_cache import PER_CHANNEL, KvHfmgParams, KvParams
from amct_pytorch.errors import CalibrationError
from amct_pytorch.formats import INT8
from amct_pytorch.observers.channel_histogram import ChannelHistogram
from amct_pytorch.observers.hfmg import search_window
from amct_pytorch.observers.histogram import Histogram
from amct_pytorch.observers.range_search import SearchSettings, search_range
from amct_pytorch.record.kv_cache import KvFactors


class KvObserver:
    """Statistics of a tensor [..., channels] over any number of batches and sequence lengths.

    Memory does not grow with the number of batches: 288 KiB per tensor, or 16 KiB a channel.

    Args:
        name: of the tensor, for messages.
        params: how it will be quantized.
        asymmetric: whether it gets a zero point.
    """

    def __init__(self, name: str, params: KvParams, *, asymmetric: bool) -> None:
        self._name = name
        self._params = params
        self._symmetric = not asymmetric
        self._histogram: Histogram | ChannelHistogram | None = None

    @property
    def seen(self) -> bool:
        """Whether any value was observed."""
        return self._histogram is not None and self._histogram.total > 0

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Observes one batch.

        Args:
            x: floating [..., channels].
            mask: what of it counts, 0 or False for padding: of the shape of `x` without its
                last axis; None: all of it.

        Raises:
            CalibrationError: `x` is no such tensor, holds NaN or infinity, or has not as many
                channels as before, or `mask` does not fit.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() == 0:
            what = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise CalibrationError(
                f"{self._name!r} is {what}; allowed: a floating tensor [..., channels]"
            )
        if mask is not None:
            if mask.shape != x.shape[:-1]:
                raise CalibrationError(
                    f"the mask of {self._name!r} has shape {list(mask.shape)}; allowed: that of "
                    f"the tensor without its last axis, {list(x.shape[:-1])}"
                )
            x = x[mask.bool()]
        if self._histogram is None:
            per_channel = self._params.quant_granularity == PER_CHANNEL
            with torch.inference_mode(False):
                self._histogram = (
                    ChannelHistogram(x.shape[-1], x.device) if per_channel else Histogram()
                )
        try:
            # Outside the caller's inference mode: what is kept may be added to in any mode.
            with torch.inference_mode(False), torch.no_grad():
                self._histogram.update(x)
        except ValueError as error:
            raise CalibrationError(f"{self._name!r} cannot be observed: it has {error}") from None

    def factors(self) -> KvFactors:
        """The factors of the range with the least error over what was observed."""
        params, symmetric = self._params, self._symmetric
        histogram = self._histogram
        assert histogram is not None
        if isinstance(params, KvHfmgParams):
            if isinstance(histogram, Histogram):
                found = search_window(histogram, params.num_of_bins, INT8, symmetric=symmetric)
                return KvFactors((found[0],), (found[1],))
            return _of(histogram.search_windows(params.num_of_bins, INT8, symmetric=symmetric))
        settings = SearchSettings(
            params.max_percentile, params.min_percentile, params.search_range, params.search_step
        )
        if isinstance(histogram, Histogram):
            scale, offset = search_range(histogram, settings, INT8, symmetric=symmetric)
            return KvFactors((scale,), (offset,))
        return _of(histogram.search(settings, INT8, symmetric=symmetric))


def _of(found: tuple[Tensor, Tensor]) -> KvFactors:
    scale, offset = found
    return KvFactors(tuple(scale.tolist()), tuple(offset.tolist()))
