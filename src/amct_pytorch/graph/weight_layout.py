"""Which weights belong to which output channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from torch import Tensor

Array = TypeVar("Array", Tensor, np.ndarray)


@dataclass(frozen=True)
class WeightLayout:
    """How a weight tensor, of torch or numpy, is parted into output channels.

    A convolution has them along one axis. A transposed convolution with groups has the
    channels of *one group* along that axis, and the groups one after the other along axis 0
    (weight [Cin, Cout / groups, *kernel]).

    Attributes:
        out_axis: the axis that counts output channels, or those of one group.
        stacked: groups that follow each other along axis 0; 1 for all but transposed
            convolutions.
    """

    out_axis: int
    stacked: int = 1

    @property
    def in_axis(self) -> int:
        """The axis that counts input channels (those of one group, or of all)."""
        return 1 - self.out_axis

    def channels(self, shape: tuple[int, ...]) -> int:
        """Output channels of a weight of this shape."""
        return shape[self.out_axis] * self.stacked

    def rows(self, weight: Array) -> Array:
        """[output channels, weights of one channel]."""
        if self.stacked > 1:
            grouped = weight.reshape((self.stacked, -1, *weight.shape[1:]))
            moved: Array = grouped.swapaxes(1, self.out_axis + 1)
            return moved.reshape((self.stacked * moved.shape[1], -1))
        moved = weight.swapaxes(0, self.out_axis)
        return moved.reshape((moved.shape[0], -1))

    def along_channels(self, values: Array, shape: tuple[int, ...]) -> Array:
        """One value, or one per output channel, made to broadcast over a weight.

        Args:
            values: [1] or [output channels].
            shape: the weight's.
        """
        ones: tuple[int, ...] = (1,) * (len(shape) - self.out_axis - 1)
        if self.stacked == 1 or values.shape[0] == 1:
            return values.reshape((1,) * self.out_axis + (-1,) + ones)
        # Row i of the weight belongs to group i // (rows of a group).
        group = np.arange(shape[0]) // (shape[0] // self.stacked)
        return values.reshape((self.stacked, -1))[group].reshape((shape[0], -1, *ones))
