"""A simulated layer is an exact integer convolution, rescaled once."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from amct_pytorch.algorithms.arq import arq_scale
from amct_pytorch.formats import INT8, IntFormat
from amct_pytorch.graph.layers import LAYER_KINDS
from amct_pytorch.graph.weight_layout import WeightLayout
from amct_pytorch.nn.simulate import IntegerOperands, Simulate, integer_bias
from amct_pytorch.nn.wrapped import CompressedLayer
from amct_pytorch.record.factors import LayerFactors

LAYERS = {
    "plain": lambda: nn.Conv2d(3, 8, 3),
    "padding": lambda: nn.Conv2d(3, 8, 5, padding=2),
    "stride": lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6),
    "groups and dilation": lambda: nn.Conv2d(6, 4, 3, padding=2, groups=2, dilation=2),
    "linear": lambda: nn.Linear(20, 7),
}


def wrapped(make: str) -> tuple[CompressedLayer, Tensor]:
    """A layer with weights from a fixed seed, and an input for it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layer = LAYERS[make]()
        # 16 images: kernels that reorder sums (Winograd) would be chosen from there on.
        x = torch.randn(16, layer.in_channels, 9, 9) if make != "linear" else torch.randn(3, 5, 20)
    kind = LAYER_KINDS[type(layer).__name__]
    return CompressedLayer("x", kind, layer, layer.weight, layer.bias), x


def factors(
    layer: CompressedLayer, x: Tensor, *, channel_wise: bool, symmetric: bool, bits: int = 8
) -> LayerFactors:
    scale_w = arq_scale(layer.weight, IntFormat(bits), WeightLayout(0), channel_wise=channel_wise)
    scale, offset = INT8.factors(x.min() * 0.9, x.max() * 0.8, symmetric=symmetric)
    return LayerFactors(tuple(scale_w.tolist()), scale.item(), offset.item(), weight_bits=bits)


def reference(layer: CompressedLayer, x: Tensor, known: LayerFactors) -> Tensor:
    """Integers and their sums in float64, from the definition; the rescaling in float32."""
    inverse = torch.tensor(1.0) / torch.tensor(known.scale_d)
    offset = known.offset_d
    q = torch.clamp(torch.round((x * inverse).double()) + offset, -128, 127)
    scale_w = torch.tensor(known.scale_w)
    shape = (-1, *[1] * (layer.weight.dim() - 1))
    half = 2 ** (known.weight_bits - 1)
    w = torch.clamp(torch.round((layer.weight / scale_w.view(shape)).double()), -half, half - 1)
    product = scale_w * torch.tensor(known.scale_d)
    bias = torch.round(layer.bias.double() / product.double()).expand(len(w))
    inner = layer.layer
    if isinstance(inner, nn.Linear):
        return (F.linear(q - offset, w, bias).float()) * product
    sums = F.conv2d(q - offset, w, bias, inner.stride, inner.padding, inner.dilation, inner.groups)
    return sums.float() * product.view(-1, 1, 1)


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("channel_wise", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_result_is_the_reference_to_the_last_bit(
    make: str, channel_wise: bool, symmetric: bool
) -> None:
    layer, x = wrapped(make)
    known = factors(layer, x, channel_wise=channel_wise, symmetric=symmetric)
    layer.stage = Simulate({"x": IntegerOperands.of(layer, known)})
    # No tolerance: every sum is an integer below 2^24, exact in float32 in any order.
    assert torch.equal(layer(x), reference(layer, x, known))


@pytest.mark.parametrize("bits", [4, 6, 7])
def test_narrow_weights(bits: int) -> None:
    layer, x = wrapped("padding")
    known = factors(layer, x, channel_wise=True, symmetric=False, bits=bits)
    operands = IntegerOperands.of(layer, known)
    assert float(operands.weight.abs().max()) <= 2 ** (bits - 1)
    layer.stage = Simulate({"x": operands})
    assert torch.equal(layer(x), reference(layer, x, known))


def test_padding_is_zero_and_not_the_offset() -> None:
    layer, x = wrapped("padding")
    with torch.no_grad():
        layer.weight.fill_(0.5)
        layer.bias.zero_()
    known = LayerFactors((0.5,), 1.0, -100)
    layer.stage = Simulate({"x": IntegerOperands.of(layer, known)})
    y = layer(torch.ones_like(x))
    # 3 channels; a corner sees 9 of the 25 positions.
    assert float(y[0, 0, 0, 0]) == 0.5 * 3 * 9
    assert float(y[0, 0, 4, 4]) == 0.5 * 3 * 25


@given(
    offset=st.integers(-128, 127),
    exponent=st.integers(-6, 2),
    values=st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=20),
)
@settings(max_examples=80)
def test_quantized_input_is_the_format_without_its_offset(
    offset: int, exponent: int, values: list[float]
) -> None:
    # Rounding then clipping to shifted bounds must be the same as adding the offset first.
    scale, x = 2.0**exponent, torch.tensor(values)
    operands = IntegerOperands(INT8, 1 / scale, offset, x, x, x, x)
    expected = INT8.quantize(x, torch.tensor(scale), offset) - offset
    assert torch.equal(operands.quantized_input(x), expected)
    assert x.tolist() == values


def test_integer_bias_rounds_half_to_even() -> None:
    bias = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 1e6])
    assert integer_bias(bias, torch.tensor([1.0])).tolist() == [0, 2, 2, 0, -2, 1e6]
    assert integer_bias(bias[:2], torch.tensor([0.5, 0.25])).tolist() == [1, 6]


def test_result_keeps_the_inputs_dtype_and_leaves_it_alone() -> None:
    layer, x = wrapped("plain")
    known = factors(layer, x, channel_wise=True, symmetric=False)
    layer.stage = Simulate({"x": IntegerOperands.of(layer, known)})
    half = x.half()
    before = half.clone()
    y = layer(half)
    assert y.dtype == torch.float16
    assert torch.equal(half, before)
    assert torch.equal(y, reference(layer, half.float(), known).half())


def test_autocast_does_not_touch_the_integers() -> None:
    layer, x = wrapped("plain")
    known = factors(layer, x, channel_wise=True, symmetric=False)
    layer.stage = Simulate({"x": IntegerOperands.of(layer, known)})
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    # Rounded to the type that the float layer's result has there.
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, reference(layer, x, known).bfloat16())


def test_a_layer_without_operands_stays_float() -> None:
    layer, x = wrapped("plain")
    layer.stage = Simulate({})
    assert torch.equal(layer(x), layer.layer(x))
