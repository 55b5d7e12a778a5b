import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import conv2d, linear

from amct_pytorch.algorithms.ofmr import FRACTIONS, solve_ofmr
from amct_pytorch.formats import FORMATS, Granularity, fake_quantize, params_of

TENSOR, CHANNEL = Granularity("tensor"), Granularity("channel")
FLOATS = ["float8_e4m3fn", "hifloat8"]


def quantizer(fmt):
    return lambda x, scale: fake_quantize(x, scale, None, fmt, TENSOR)


def relative(found, meant):
    return float((found.double() - meant.double()).square().sum() / meant.double().square().sum())


def linear_case(seed, tokens=40):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 24, generator=g) * torch.rand(6, 1, generator=g).mul(3).exp()
    x = torch.randn(tokens, 24, generator=g) * torch.rand(tokens, 1, generator=g).mul(4).exp()
    return weight, x


@pytest.mark.parametrize("name", FLOATS)
def test_agrees_with_trying_everything_one_by_one(name):
    fmt = FORMATS[name]
    weight, x = linear_case(0)
    meant = linear(x, weight)
    by_extremes = x.abs().max().view(1) / fmt.reach
    found = solve_ofmr(
        weight, [x], linear, fmt, CHANNEL, quantize_input=quantizer(fmt), input_scale=by_extremes
    )
    scale_w = params_of(weight, fmt, CHANNEL).scale

    def output(input_scale, row, scale):
        rounded = fake_quantize(weight[row : row + 1], scale.view(1, 1), None, fmt, CHANNEL)
        return linear(fake_quantize(x, input_scale, None, fmt, TENSOR), rounded)[:, 0]

    def total(input_scale):
        return sum(
            float((output(input_scale, n, scale_w[n]) - meant[:, n]).square().sum())
            for n in range(6)
        )

    best_input = min((by_extremes * f for f in FRACTIONS), key=total)
    assert torch.equal(found.input_scale, best_input)
    for n in range(6):
        best = min(
            (scale_w[n] * f for f in FRACTIONS),
            key=lambda s: float((output(best_input, n, s) - meant[:, n]).square().sum()),
        )
        assert torch.equal(found.weight_scale[n], best)
    assert found.error < found.error_extremes


@given(
    seed=st.integers(0, 10**6), name=st.sampled_from(FLOATS), by=st.sampled_from([TENSOR, CHANNEL])
)
@settings(max_examples=25, deadline=None)
def test_is_never_worse_than_extremes_and_tells_its_error(seed, name, by):
    fmt = FORMATS[name]
    weight, x = linear_case(seed, tokens=10)
    by_extremes = x.abs().max().view(1) / fmt.reach
    found = solve_ofmr(
        weight, [x[:4], x[4:]], linear, fmt, by,
        quantize_input=quantizer(fmt), input_scale=by_extremes,
    )  # fmt: skip
    rounded = fake_quantize(weight, found.weight_scale, None, fmt, by)
    error = relative(linear(quantizer(fmt)(x, found.input_scale), rounded), linear(x, weight))
    assert error == pytest.approx(found.error, rel=1e-4)  # float32 outputs of other batch sizes
    assert found.error <= found.error_extremes


def test_groups_of_a_convolution():
    fmt = FORMATS["float8_e4m3fn"]
    g = torch.Generator().manual_seed(2)
    weight, x = torch.randn(8, 1, 3, 3, generator=g), torch.randn(2, 8, 9, 9, generator=g)

    def operator(x, w):
        return conv2d(x, w, padding=1, groups=8).movedim(1, -1)

    found = solve_ofmr(weight, [x], operator, fmt, CHANNEL)
    assert found.input_scale is None
    assert found.weight_scale.shape == (8, 1, 1, 1)
    for n in range(8):  # a depthwise channel is a layer of its own
        alone = solve_ofmr(
            weight[n : n + 1], [x[:, n : n + 1]],
            lambda x, w: conv2d(x, w, padding=1).movedim(1, -1), fmt, CHANNEL,
        )  # fmt: skip
        assert torch.equal(alone.weight_scale[0], found.weight_scale[n])
