"""The Tucker-2 form: fewer channels on both sides of the whole kernel.

L. De Lathauwer, B. De Moor, J. Vandewalle: A multilinear singular value decomposition, SIAM J.
Matrix Anal. Appl. 21 (2000); for convolutions Y.-D. Kim et al., ICLR 2016. With the weight turned
into the bases of both channel axes, the error of every pair of ranks is read off one table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from amct_pytorch.decomposition.factorise import factorise
from amct_pytorch.decomposition.geometry import Geometry, Split
from amct_pytorch.decomposition.policy import RANK_MULTIPLE


@dataclass(frozen=True)
class Tucker:
    """A Tucker-2 form of one weight.

    Attributes:
        split: shapes of its three pieces.
        weights: their weights.
        error: relative Frobenius error.
    """

    split: Split
    weights: list[Tensor]
    error: float


def cheapest_tucker(weight: Tensor, geometry: Geometry, error: float) -> Tucker | None:
    """The Tucker-2 form with the fewest FLOPs whose error is at most `error`, or None.

    Args:
        weight: [N, C, kh, kw], float32 or float64, finite and not all zero.
        geometry: of the layer.
        error: relative Frobenius error that is allowed.
    """
    outputs = _basis(weight.flatten(1))
    inputs = _basis(weight.transpose(0, 1).flatten(1))
    core = torch.einsum("no,ncij,ck->okij", outputs, weight, inputs)
    captured = (core.double() ** 2).sum(dim=(2, 3)).cumsum(0).cumsum(1)
    needed = (1 - error**2) * float(captured[-1, -1])
    best: tuple[int, int, int] | None = None
    for rank_out in _ranks(geometry.out_channels):
        for rank_in in _ranks(geometry.in_channels):
            if float(captured[rank_out - 1, rank_in - 1]) >= needed:
                macs = geometry.macs(geometry.tucker(rank_in, rank_out))
                if best is None or macs < best[0]:
                    best = (macs, rank_in, rank_out)
                break
    if best is None:
        return None
    _, rank_in, rank_out = best
    left, right = outputs[:, :rank_out], inputs[:, :rank_in]
    kept = core[:rank_out, :rank_in]
    rebuilt = torch.einsum("no,okij,ck->ncij", left, kept, right)
    weights = [right.T[:, :, None, None], kept, left[:, :, None, None]]
    found = float((rebuilt - weight).norm() / weight.norm())
    return Tucker(geometry.tucker(rank_in, rank_out), weights, found)


def _basis(unfolded: Tensor) -> Tensor:
    """Orthonormal basis [n, n] of the rows' side, leading directions first."""
    found = factorise(unfolded)
    vectors = found.basis(min(unfolded.shape)).to(unfolded.dtype)
    if found.of_rows:
        return vectors
    complete: Tensor = torch.linalg.qr(unfolded @ vectors, mode="complete")[0]
    return complete


def _ranks(channels: int) -> list[int]:
    return [*range(RANK_MULTIPLE, channels, RANK_MULTIPLE), channels]
