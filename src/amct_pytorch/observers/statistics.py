"""What is kept of a layer's input and output, and how two outputs are compared."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from amct_pytorch.graph.tensors import in_float64
from amct_pytorch.observers.histogram import Histogram
from amct_pytorch.observers.mean_input import MeanInput

# Values of one output that are kept to compare float and quantized results on.
SAMPLE_SIZE = 2**16


def sample(y: Tensor) -> Tensor:
    """At most SAMPLE_SIZE values of `y` at even distances, float32, always the same ones."""
    return y.detach().flatten()[:: _distance(y.numel())].float().clone()


def sampled_channels(y: Tensor, channel_axis: int) -> Tensor:
    """The channel of each value of `sample(y)`, int64."""
    axis = channel_axis % y.dim()
    positions = torch.arange(0, y.numel(), _distance(y.numel()), device=y.device)
    return positions // math.prod(y.shape[axis + 1 :]) % y.shape[axis]


def _distance(number: int) -> int:
    """The distance at which `sample` takes values, never in step with the tensor's sizes."""
    step = max(1, math.ceil(number / SAMPLE_SIZE))
    while number and math.gcd(step, number) > 1:
        step += 1
    return step


@dataclass
class LayerStatistics:
    """What was observed of one layer in the float network.

    Attributes:
        inputs: histogram of its input over all batches.
        outputs: histogram of its output over all batches, where that is wanted.
        mean_input: mean of its input over all batches, where biases are corrected.
        output: sample of its output on the last batch; None if it did not run on it.
        output_shape: of its output on the batch seen last.
    """

    inputs: Histogram = field(default_factory=Histogram)
    outputs: Histogram | None = None
    mean_input: MeanInput | None = None
    output: Tensor | None = None
    output_shape: tuple[int, ...] | None = None

    def merge(self, other: LayerStatistics) -> None:
        """Adds what was observed on other batches, all but the sample of the last one."""
        self.inputs.merge(other.inputs)
        if self.outputs is not None and other.outputs is not None:
            self.outputs.merge(other.outputs)
        if self.mean_input is not None and other.mean_input is not None:
            self.mean_input.merge(other.mean_input)


@dataclass(frozen=True)
class Agreement:
    """How near a quantized tensor is to its float original.

    Attributes:
        sqnr_db: 10 log10 of signal power over error power, dB; inf where they are equal.
        cosine: cosine of the two as vectors; 1 where both are zero.
    """

    sqnr_db: float
    cosine: float

    @classmethod
    def between(cls, original: Tensor, other: Tensor) -> Agreement:
        """Compares two tensors of one shape, in float64.

        The same infinity, or NaN, in both is left out (masked logits, say); in one only, it
        is an infinite error.
        """
        a, b = in_float64(original).flatten(), in_float64(other).flatten()
        finite = torch.isfinite(a) & torch.isfinite(b)
        if not bool(finite.all()):
            same = (a == b) | (torch.isnan(a) & torch.isnan(b))
            if not bool((finite | same).all()):
                return cls(-math.inf, 0.0)
            if not bool(finite.any()):
                # Nothing is left to compare, and nothing good to be said of it.
                return cls(-math.inf, 0.0)
            a, b = a[finite], b[finite]
        signal, noise = float(a.square().sum()), float((a - b).square().sum())
        if noise == 0:
            return cls(math.inf, 1.0)
        sqnr = 10 * math.log10(signal / noise) if signal else -math.inf
        norm = math.sqrt(signal * float(b.square().sum()))
        return cls(sqnr, float(a @ b) / norm if norm else 0.0)
