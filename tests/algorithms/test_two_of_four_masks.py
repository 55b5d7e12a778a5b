"""Which two of each four weights stay."""

import pytest
import torch

from amct_pytorch.algorithms.two_of_four import two_of_four_mask, why_dense
from amct_pytorch.graph.layers import LAYER_KINDS


def layout(kind, groups=1):
    return LAYER_KINDS[kind].layout(groups)


def slow_mask(weight, kind, groups):
    """The definition, weight by weight."""
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    transposed = kind == "ConvTranspose2d"
    channels = weight.shape[0] // groups if transposed else weight.shape[1]
    for group in range(groups if transposed else 1):
        for others in torch.cartesian_prod(
            *(
                torch.arange(size)
                for axis, size in enumerate(weight.shape)
                if axis != (0 if transposed else 1)
            )
        ).reshape(-1, weight.dim() - 1):
            rest = [int(i) for i in others]
            for start in range(0, channels, 4):
                places = [
                    (group * channels + c, *rest) if transposed else (rest[0], c, *rest[1:])
                    for c in range(start, min(start + 4, channels))
                ]
                best = sorted(places, key=lambda place: -abs(float(weight[place])))[:2]
                for place in best:
                    mask[place] = True
    return mask


@pytest.mark.parametrize(
    ("kind", "shape", "groups"),
    [
        ("Linear", (6, 8), 1),
        ("Linear", (3, 7), 1),
        ("Conv2d", (4, 3, 3, 3), 1),
        ("Conv2d", (4, 8, 3, 2), 1),
        ("Conv2d", (8, 6, 1, 1), 2),
        ("ConvTranspose2d", (8, 3, 2, 2), 1),
        ("ConvTranspose2d", (10, 2, 3, 3), 2),
    ],
)
def test_the_two_largest_of_each_four_stay(kind, shape, groups):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    mask = two_of_four_mask(weight, layout(kind, groups))
    assert torch.equal(mask, slow_mask(weight, kind, groups))


def test_of_equal_weights_the_first_stay():
    mask = two_of_four_mask(torch.tensor([[0.0, 0, 0, 0, 1, -2, 2, 2]]), layout("Linear"))
    assert mask.tolist() == [[True, True, False, False, False, True, True, False]]


def test_half_precision():
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    low = weight.to(torch.bfloat16)
    assert torch.equal(
        two_of_four_mask(low, layout("Linear")), two_of_four_mask(low.float(), layout("Linear"))
    )


@pytest.mark.parametrize(
    ("kind", "shape", "groups", "said"),
    [
        ("Conv2d", (8, 1, 3, 3), 8, "one input channel in a group"),
        ("ConvTranspose2d", (8, 1, 2, 2), 4, "2 input channels in a group"),
        ("Linear", (4, 3), 1, None),
        ("ConvTranspose2d", (8, 4, 2, 2), 2, None),
    ],
)
def test_weights_of_which_nothing_would_go(kind, shape, groups, said):
    reason = why_dense(shape, layout(kind, groups))
    assert reason is None if said is None else said in reason
    if said:
        assert two_of_four_mask(torch.ones(shape), layout(kind, groups)).all()
