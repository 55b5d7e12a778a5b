"""Rank policies: how many components of a layer are kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from amct_pytorch.decomposition.evbmf import Evbmf, evbmf, evbmf_leading
from amct_pytorch.decomposition.factorise import Factorisation
from amct_pytorch.errors import ArgumentTypeError, ArgumentValueError, did_you_mean, shown

POLICIES = ("vbmf", "energy", "flops")
# Ranks are multiples of this: what vector units and matrix engines work in.
RANK_MULTIPLE = 16
# Energies less certain than this share of the threshold cannot tell how strong the noise is.
UNCLEAR = 0.05
# The default bounds of the vbmf policy: parts of the matrix's smaller side, from so many
# channels (the smaller of in and out) on.
WIDE_CHANNELS = 256
BOUNDS = (7, 6)
WIDE_BOUNDS = (5, 4)


@dataclass(frozen=True)
class RankChoice:
    """A rank and where it comes from.

    Attributes:
        rank: components to keep; 0 if there is nothing to keep.
        estimate: what the policy wanted before bounds and rounding.
        certain: whether errors of the energies as large as they may be would not change it.
        at_least: whether the estimate is a lower bound: it is above what the bounds allow.
    """

    rank: int
    estimate: int
    certain: bool
    at_least: bool = False


@dataclass(frozen=True)
class RankPolicy:
    """A checked rank policy.

    Attributes:
        name: ``vbmf``: the number of components that are signal by variational Bayes.
            ``energy``: as many as hold a share of the squared weights.
            ``flops``: as many as a share of the layer's FLOPs pays for.
        energy: the share kept by ``energy``, 0 < energy <= 1.
        flops_ratio: the share of FLOPs allowed by ``flops``, 0 < flops_ratio < 1.
        bounded: whether ``vbmf`` keeps between 1/7 and 1/6 of the smaller side of the matrix
            (1/5 and 1/4 from 256 channels on), whatever the estimate.
    """

    name: str = "vbmf"
    energy: float = 0.9
    flops_ratio: float = 0.5
    bounded: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ArgumentTypeError(
                f"rank_policy is a {type(self.name).__name__}; allowed are {', '.join(POLICIES)}"
            )
        if self.name not in POLICIES:
            raise ArgumentValueError(
                f"rank_policy is {shown(self.name)}; allowed are {', '.join(POLICIES)}"
                f"{did_you_mean(self.name, POLICIES)}"
            )
        check_share("energy", self.energy, "0 < energy <= 1", lambda v: 0 < v <= 1)
        check_share("flops_ratio", self.flops_ratio, "0 < flops_ratio < 1", lambda v: 0 < v < 1)
        if not isinstance(self.bounded, bool):
            raise ArgumentTypeError(
                f"rank_bounds is a {type(self.bounded).__name__}; allowed are True and False"
            )

    def components(
        self, matrix_shape: tuple[int, int], channels: int, affordable: Callable[[float], int]
    ) -> int | None:
        """How many leading components `choose` needs to know at most; None: all.

        Args: as for `choose`.
        """
        side = min(matrix_shape)
        if self.name == "flops":
            return self._affordable(side, affordable).rank or None
        if self.name == "vbmf" and self.bounded:
            most = rank_bounds(side, channels)[1]
            # One beyond the bound, to see that an estimate reaches it.
            return min(max(_nearest(most), most + 2), side)
        return None

    def choose(
        self,
        found: Factorisation,
        matrix_shape: tuple[int, int],
        channels: int,
        affordable: Callable[[float], int],
    ) -> RankChoice:
        """The rank for one matrix.

        Args:
            found: its factorisation, of `components` components at least.
            matrix_shape: (rows, columns).
            channels: the smaller of the layer's channel counts.
            affordable: the largest rank whose FLOPs are at most that share of the layer's.
        """
        side = min(matrix_shape)
        if self.name == "flops":
            return self._affordable(side, affordable)
        if self.name == "energy":
            shares = found.energies.cumsum(0) / found.energies.sum()
            slack = 1e-7 if "float32" in found.method else 0.0
            estimates = [
                min(int((shares < self.energy + shift).sum()) + 1, side)
                for shift in (0.0, -slack, slack)
            ]
            ranks = [min(_up(estimate), side) for estimate in estimates]
            return RankChoice(ranks[0], estimates[0], len(set(ranks)) == 1)
        analysis = self._analysis(found, matrix_shape, channels)
        if analysis is None:
            return RankChoice(0, 0, False)
        estimates = [
            int((found.energies > analysis.threshold + shift).sum())
            for shift in (0.0, -found.uncertainty, found.uncertainty)
        ]
        ranks = [self._bounded(estimate, side, channels) for estimate in estimates]
        clear = found.uncertainty <= UNCLEAR * analysis.threshold
        certain = clear and len(set(ranks)) == 1
        return RankChoice(ranks[0], estimates[0], certain, analysis.at_least)

    def _analysis(
        self, found: Factorisation, matrix_shape: tuple[int, int], channels: int
    ) -> Evbmf | None:
        """Rank and noise; None if the components that are known do not decide."""
        if found.complete:
            return evbmf(found.energies, *matrix_shape)
        return evbmf_leading(
            found.energies,
            found.total,
            found.squares,
            *matrix_shape,
            enough=rank_bounds(min(matrix_shape), channels)[1],
            uncertainty=found.uncertainty,
        )

    def _affordable(self, side: int, affordable: Callable[[float], int]) -> RankChoice:
        allowed = affordable(self.flops_ratio)
        whole = allowed // RANK_MULTIPLE * RANK_MULTIPLE
        return RankChoice(min(whole or allowed, side), allowed, True)

    def _bounded(self, estimate: int, side: int, channels: int) -> int:
        if self.bounded:
            low, high = rank_bounds(side, channels)
            estimate = min(max(estimate, low), high)
        elif estimate == 0:
            return 0
        return min(_nearest(estimate), side)


def rank_bounds(side: int, channels: int) -> tuple[int, int]:
    """Least and most rank of the default bounds, before rounding."""
    least, most = WIDE_BOUNDS if channels >= WIDE_CHANNELS else BOUNDS
    low = math.ceil(side / least)
    return low, max(low, side // most)


def _nearest(rank: int) -> int:
    """The multiple nearest to `rank`, the larger of two, at least one multiple."""
    return max((rank + RANK_MULTIPLE // 2) // RANK_MULTIPLE, 1) * RANK_MULTIPLE


def _up(rank: int) -> int:
    return math.ceil(rank / RANK_MULTIPLE) * RANK_MULTIPLE


def check_share(name: str, value: object, allowed: str, test: Callable[[float], bool]) -> None:
    """Raises an error unless `value` is a number that passes `test`.

    Raises:
        ArgumentTypeError: it is no number.
        ArgumentValueError: it is out of range (NaN too).
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(
            f"{name} is a {type(value).__name__}; allowed is a number, {allowed}"
        )
    if not test(value):
        raise ArgumentValueError(f"{name} is {value}; allowed is {allowed}")
