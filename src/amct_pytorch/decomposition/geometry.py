"""Shapes and costs of a convolution and of the pieces it is split into.

A *split* is the list of the pieces' weight shapes ``(out, in, kh, kw)``. Each kernel axis of the
layer belongs to one piece, which has the layer's kernel size, stride and padding there; all other
pieces have a kernel of 1 along that axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

Shape = tuple[int, int, int, int]
Split = tuple[Shape, ...]
# (height, width) of the input and of the output.
Sizes = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Geometry:
    """What of a Conv2d decides about its costs.

    Attributes:
        in_channels: of the layer.
        out_channels: of the layer.
        kernel: (height, width).
        stride: (vertical, horizontal).
    """

    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Geometry:
        """That of a layer."""
        height, width = conv.kernel_size
        down, right = conv.stride
        return cls(conv.in_channels, conv.out_channels, (height, width), (down, right))

    @property
    def whole(self) -> Split:
        """The layer as it is, as a split of one piece."""
        return ((self.out_channels, self.in_channels, *self.kernel),)

    def spatial(self, axis: int, rank: int) -> Split:
        """Two pieces, the first along kernel axis `axis` (0: vertical), `rank` channels between."""
        height, width = self.kernel
        if axis == 0:
            return (rank, self.in_channels, height, 1), (self.out_channels, rank, 1, width)
        return (rank, self.in_channels, 1, width), (self.out_channels, rank, height, 1)

    def tucker(self, inner_in: int, inner_out: int) -> Split:
        """Three pieces: 1 x 1, the whole kernel between fewer channels, 1 x 1."""
        return (
            (inner_in, self.in_channels, 1, 1),
            (inner_out, inner_in, *self.kernel),
            (self.out_channels, inner_out, 1, 1),
        )

    def macs(self, split: Split, sizes: Sizes | None = None) -> int:
        """Multiply-accumulates of a split.

        Args:
            split: its pieces.
            sizes: of the layer's input and output; None: count for one output position.
        """
        before, after = sizes or (self.stride, (1, 1))
        owner = axis_owners(self.kernel, split)
        count = 0
        for place, shape in enumerate(split):
            height, width = (
                after[axis] if owner[axis] <= place else before[axis] for axis in (0, 1)
            )
            count += math.prod(shape) * height * width
        return count


def weights_in(split: Split) -> int:
    """Number of weights of all pieces."""
    return sum(math.prod(shape) for shape in split)


def axis_owners(kernel: tuple[int, int], split: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Which piece each kernel axis belongs to.

    Raises:
        ValueError: the pieces' kernels do not make up `kernel`; the text says how.
    """
    owners = []
    for axis, size in enumerate(kernel):
        sides = [shape[2 + axis] for shape in split]
        wide = [place for place, side in enumerate(sides) if side != 1]
        if wide != ([] if size == 1 else wide[:1]) or (wide and sides[wide[0]] != size):
            raise ValueError(
                f"kernel sides {sides} along the {('height', 'width')[axis]}; exactly one piece "
                f"must have {size} there and the others 1"
            )
        if size != 1 and not wide:
            raise ValueError(
                f"no piece has the kernel's {size} along the {('height', 'width')[axis]}"
            )
        owners.append(wide[0] if wide else 0)
    return owners[0], owners[1]
