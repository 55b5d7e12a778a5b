"""Which elements of a tensor share a scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor
from torch.nn.functional import pad

from amct_pytorch.errors import ArgumentValueError, did_you_mean

Kind = Literal["tensor", "channel", "group", "token"]


@dataclass(frozen=True)
class Granularity:
    """How a tensor is cut into granules, each with one scale and offset.

    ======= ============================================= =================== ===============
    kind    one granule                                   shape [N, K]        [N, C, kh, kw]
    ======= ============================================= =================== ===============
    tensor  everything                                    scales [1]          [1]
    channel one index of the first axis                   [N, 1]              [N, 1, 1, 1]
    group   `group_size` neighbours along the last axis;  [N, ceil(K / size)] on kw
            the last may be short
    token   one vector along the last axis                [N, 1]              [N, C, kh, 1]
    ======= ============================================= =================== ===============

    Scales of all kinds but group broadcast to the tensor; `expand` does it for every kind.

    Attributes:
        kind: see the table.
        group_size: at least 1 with kind group, None otherwise.

    Raises:
        ArgumentValueError: on construction, for an unknown kind or a wrong `group_size`.
    """

    kind: Kind
    group_size: int | None = None

    def __post_init__(self) -> None:
        kinds = get_args(Kind)
        if self.kind not in kinds:
            raise ArgumentValueError(
                f"granularity is {self.kind!r}; allowed are {', '.join(kinds)}"
                f"{did_you_mean(str(self.kind), kinds)}"
            )
        if self.kind != "group" and self.group_size is not None:
            raise ArgumentValueError(
                f"group_size is {self.group_size}; only granularity 'group' has one"
            )
        if self.kind == "group" and (self.group_size is None or self.group_size < 1):
            raise ArgumentValueError(f"group_size is {self.group_size}; allowed are 1 and above")

    def scales_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the scales of a tensor of that `shape` (at least one dimension)."""
        if self.kind == "tensor":
            return (1,)
        if self.kind == "channel":
            return (shape[0], *(1 for _ in shape[1:]))
        if self.group_size is None:
            return (*shape[:-1], 1)
        return (*shape[:-1], -(-shape[-1] // self.group_size))

    def rows(self, x: Tensor) -> Tensor:
        """`x` with one granule a row: the last axis runs through a granule.

        A short last group is filled up with zeros. A view of `x` where its memory allows.
        """
        if self.kind == "tensor":
            return x.reshape(1, -1)
        if self.kind == "channel":
            return x.flatten(1) if x.dim() > 1 else x[:, None]
        if self.group_size is None:
            return x
        short = -x.shape[-1] % self.group_size
        filled = pad(x, (0, short)) if short else x
        groups: Tensor = filled.unflatten(-1, (-1, self.group_size))
        return groups

    def from_rows(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """The tensor of that `shape` whose `rows` these are; what was filled up is cut off."""
        if self.kind == "group":
            return rows.flatten(-2)[..., : shape[-1]]
        return rows.reshape(*shape)

    def reduce(self, x: Tensor, statistic: Callable[..., Tensor]) -> Tensor:
        """`statistic` of each granule, in the shape of the scales.

        Args:
            x: at least one dimension.
            statistic: called once as ``statistic(rows, dim=-1)``, e.g. `torch.amax`. The zeros
                that fill up a short last group are part of what it sees.
        """
        return statistic(self.rows(x), dim=-1).reshape(self.scales_shape(x.shape))

    def expand(self, scale: Tensor, shape: Sequence[int]) -> Tensor:
        """Scales (of `scales_shape(shape)`) repeated to a tensor of that `shape`."""
        if self.group_size is not None:
            return scale.repeat_interleave(self.group_size, dim=-1)[..., : shape[-1]]
        return scale.expand(*shape)
