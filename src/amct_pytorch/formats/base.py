"""What every number format can do: round, encode, decode, pack."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from amct_pytorch.errors import ArgumentValueError
from amct_pytorch.formats.packing import pack_nibbles, unpack_nibbles


class NumberFormat(ABC):
    """A finite set of numbers, the rounding to it, and the codes that stand for its members.

    A format is a value: it has no state, compares equal to its like, and works on tensors of any
    shape, device and floating dtype. Scales are applied outside (see `quantizer`): all methods
    here work in units of the scale.

    Attributes:
        bits: width of one packed code.
    """

    bits: int

    @property
    @abstractmethod
    def name(self) -> str:
        """The name that configs use, e.g. ``int8``."""

    @property
    @abstractmethod
    def largest(self) -> float:
        """The largest finite number."""

    @property
    @abstractmethod
    def code_dtype(self) -> torch.dtype:
        """The dtype of one unpacked code."""

    @abstractmethod
    def round(self, x: Tensor) -> Tensor:
        """The nearest number of the format for each element, as float32.

        Finite values beyond the range go to its end. NaN stays NaN. What happens to a tie and to
        infinity is said by each format.
        """

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """The codes (`code_dtype`, shape of `x`) of ``round(x)``.

        Where a format has no NaN, NaN gets the code of zero.
        """

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """The numbers (float32, shape of `codes`) that codes stand for."""

    @abstractmethod
    def factors(self, lo: Tensor, hi: Tensor, *, symmetric: bool) -> tuple[Tensor, Tensor]:
        """Scale (positive) and offset (int32) that spread the format over [lo, hi].

        Args:
            lo: lower ends, any shape, floating; moved to 0 where above it.
            hi: upper ends, same shape; moved to 0 where below it.
            symmetric: whether the offset is fixed at 0.
        """

    def pack(self, codes: Tensor, axis: int = -1) -> Tensor:
        """Codes as they are stored: up to four bits two per byte, low nibble first; else as is.

        Args:
            codes: of `code_dtype`, at least one dimension.
            axis: the axis along which neighbours share a byte; an odd size gets a zero nibble.

        Returns:
            uint8, with ceil(size / 2) along `axis`, for formats of up to four bits; else `codes`.
        """
        return pack_nibbles(codes, axis) if self.bits <= 4 else codes

    def unpack(self, packed: Tensor, size: int, axis: int = -1) -> Tensor:
        """The codes that `pack` stored.

        Args:
            packed: what `pack` returned.
            size: how many codes there are along `axis`.
            axis: the axis that was given to `pack`.

        Raises:
            ArgumentValueError: if `packed` does not hold `size` codes along `axis`.
        """
        if self.bits <= 4:
            return unpack_nibbles(packed, size, axis).to(self.code_dtype)
        if packed.shape[axis] != size:
            raise ArgumentValueError(
                f"size is {size}; the packed {self.name} tensor of shape {tuple(packed.shape)} "
                f"has {packed.shape[axis]} along axis {axis}"
            )
        return packed


def to_float32(x: Tensor) -> Tensor:
    """`x` as float32, such that rounding the result again equals rounding `x` once.

    float64 is rounded to odd (Boldo and Melquiond, IEEE Trans. Computers 57(4), 2008, section 3):
    toward zero, with the last bit set where something was lost. A tie of a narrower format is
    then a tie only if it was one in float64, and finite values stay finite.
    """
    if x.dtype != torch.float64:
        return x.float()
    nearest = x.float()
    toward_zero = torch.where(
        nearest.abs().double() > x.abs(), torch.nextafter(nearest, nearest.new_zeros(())), nearest
    )
    inexact = (toward_zero.double() != x) & ~x.isnan()
    return (toward_zero.view(torch.int32) | inexact.to(torch.int32)).view(torch.float32)
