"""The mean output shift from mean inputs equals the mean over the data itself."""

import pytest
import torch
import torch.nn.functional as F

from amct_pytorch.algorithms.bias_correction import output_shift
from amct_pytorch.observers.mean_input import MeanInput


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.5


def mean_input(batches: list[torch.Tensor], *, channels_last: bool) -> MeanInput:
    mean = MeanInput()
    for batch in batches:
        mean.update(batch, channels_last=channels_last)
    return mean


CONVS = {
    "plain": ((6, 4, 3, 3), {}),
    "padding": ((6, 4, 3, 3), {"padding": 2}),
    "same": ((6, 4, 5, 3), {"padding": "same"}),
    "stride": ((6, 4, 3, 3), {"stride": (2, 3), "padding": 1}),
    "groups": ((6, 2, 3, 3), {"groups": 2, "padding": 1}),
    "depthwise": ((8, 1, 3, 3), {"groups": 4, "padding": 1}),
    "dilation": ((6, 4, 3, 2), {"dilation": (2, 3), "padding": (2, 1)}),
    "everything": ((4, 2, 3, 3), {"groups": 2, "dilation": 2, "stride": 2, "padding": (3, 1)}),
}


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("sizes", [[(9, 10)], [(9, 10), (14, 7)]], ids=["one size", "two sizes"])
def test_convolution(name: str, sizes: list[tuple[int, int]]) -> None:
    shape, options = CONVS[name]
    error = random(*shape, seed=1)
    batches = [random(n, 4, *size, seed=n) for n, size in zip((3, 1, 5), sizes * 3, strict=False)]
    outputs = [F.conv2d(x.double(), error.double(), **options) for x in batches]
    every = torch.cat([y.transpose(0, 1).flatten(1) for y in outputs], dim=1)
    found = output_shift(
        mean_input(batches, channels_last=False), lambda mean: F.conv2d(mean, error, **options), 1
    )
    # float32 sums of up to 36 products of size 1 against float64.
    torch.testing.assert_close(found, every.mean(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "shapes", [[(5, 8), (3, 8)], [(2, 7, 8), (4, 3, 8)], [(5, 8), (2, 3, 4, 8)]]
)
def test_linear(shapes: list[tuple[int, ...]]) -> None:
    error = random(6, 8, seed=1)
    batches = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    every = torch.cat([F.linear(x.double(), error.double()).reshape(-1, 6) for x in batches])
    found = output_shift(
        mean_input(batches, channels_last=True), lambda mean: F.linear(mean, error), -1
    )
    torch.testing.assert_close(found, every.mean(0), rtol=1e-5, atol=1e-5)


def test_padding_makes_positions_matter() -> None:
    """A mean over positions alone would be wrong here, so the test above can fail."""
    error = random(2, 1, 3, 3)
    x = torch.zeros(1, 1, 4, 4)
    x[..., 0, 0] = 1.0
    spread = torch.full_like(x, 1 / 16)
    found = output_shift(
        mean_input([x], channels_last=False), lambda mean: F.conv2d(mean, error, padding=1), 1
    )
    exact = F.conv2d(x, error, padding=1).mean((0, 2, 3)).double()
    wrong = F.conv2d(spread, error, padding=1).mean((0, 2, 3)).double()
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)
    assert float((wrong - exact).abs().max()) > 0.01
