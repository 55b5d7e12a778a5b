"""ARQ weight scales, their floor for the bias, and float16 scales."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from amct_pytorch.algorithms.arq import arq_scale, bias_limit, floored_for_bias
from amct_pytorch.algorithms.solve import fp16_scale
from amct_pytorch.formats import IntFormat
from amct_pytorch.graph.weight_layout import WeightLayout
from amct_pytorch.nn.simulate import integer_bias

EPSILON = float(np.finfo(np.float32).eps)


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def defined(values: np.ndarray, bits: int) -> float:
    hi, lo = max(float(values.max()), 0.0), min(float(values.min()), 0.0)
    scale = hi / (2 ** (bits - 1) - 1) if hi >= -lo else -lo / 2 ** (bits - 1)
    return 1.0 if scale < 2.0**-23 else scale


@pytest.mark.parametrize("bits", [4, 6, 7, 8])
@pytest.mark.parametrize(
    ("shape", "out_axis"),
    [((8, 3, 3, 3), 0), ((6, 1, 5, 5), 0), ((10, 4), 0), ((4, 6, 3, 3), 1), ((1, 2, 1, 1), 0)],
    ids=["conv", "depthwise", "linear", "transposed", "one channel"],
)
def test_scales_follow_the_definition(bits: int, shape: tuple[int, ...], out_axis: int) -> None:
    weight = weights(*shape)
    fmt = IntFormat(bits)
    channels = np.moveaxis(weight.numpy(), out_axis, 0)
    by_channel = arq_scale(weight, fmt, WeightLayout(out_axis), channel_wise=True)
    # One float32 division.
    expected = [defined(channel, bits) for channel in channels]
    assert by_channel.tolist() == pytest.approx(expected, rel=EPSILON)
    whole = arq_scale(weight, fmt, WeightLayout(out_axis), channel_wise=False)
    assert whole.tolist() == pytest.approx([defined(channels, bits)], rel=EPSILON)


def test_the_largest_weight_is_exact_and_the_whole_range_is_used() -> None:
    weight = weights(50, 3, 3, 3)
    fmt = IntFormat(8)
    scale = arq_scale(weight, fmt, WeightLayout(0), channel_wise=True).view(-1, 1, 1, 1)
    codes = fmt.quantize(weight, scale)
    steps = ((codes * scale - weight) / scale).abs().flatten(1)
    largest = weight.abs().flatten(1).argmax(1, keepdim=True)
    # 128 steps in float32.
    assert float(steps.gather(1, largest).max()) < 128 * EPSILON
    # Half a step anywhere, but above 127.5 steps where the negative side gave the scale.
    clipped = (weight / scale > 127.5).flatten(1)
    assert float(steps[~clipped].max()) <= 0.5 + 128 * EPSILON
    assert float(steps[clipped].max()) <= 1.0
    rows = codes.flatten(1)
    assert bool(((rows.amax(1) == 127) | (rows.amin(1) == -128)).all())


def test_negative_side_decides_where_it_is_larger() -> None:
    weight = torch.tensor([[-128.0, 127.0], [-127.0, 127.0], [-1.28, 0.0]])
    scale = arq_scale(weight, IntFormat(8), WeightLayout(0), channel_wise=True)
    assert scale.tolist() == pytest.approx([1.0, 1.0, 0.01], rel=EPSILON)


def test_dead_channels_get_the_smallest_scale_and_leave_the_others_alone() -> None:
    weight = weights(4, 3, 3, 3)
    weight[1] = 0
    weight[2] *= 1e-9
    scale = arq_scale(weight, IntFormat(8), WeightLayout(0), channel_wise=True)
    assert scale[1:3].tolist() == [2.0**-23, 2.0**-23]
    assert scale[0].item() == pytest.approx(defined(weight[0].numpy(), 8), rel=EPSILON)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scales_of_other_dtypes_are_float32(dtype: torch.dtype) -> None:
    weight = weights(4, 3).to(dtype)
    scale = arq_scale(weight, IntFormat(8), WeightLayout(0), channel_wise=True)
    assert scale.dtype == torch.float32
    assert scale.tolist() == pytest.approx(
        [defined(row, 8) for row in weight.double().numpy()], rel=2 * EPSILON
    )


@given(
    scale_w=st.lists(st.floats(2.0**-23, 10, width=32), min_size=1, max_size=6),
    biases=st.lists(st.floats(-1e6, 1e6, width=32), min_size=6, max_size=6),
    scale_d=st.floats(2.0**-23, 100, width=32),
    per_tensor=st.booleans(),
)
@example(scale_w=[2.0**-23], biases=[3.0] * 6, scale_d=0.1, per_tensor=True)
def test_floor_bounds_the_integer_bias(
    scale_w: list[float], biases: list[float], scale_d: float, per_tensor: bool
) -> None:
    scale = torch.tensor(scale_w[:1] if per_tensor else scale_w)
    bias = torch.tensor(biases if per_tensor else biases[: len(scale_w)])
    scale_d = float(torch.tensor(scale_d))
    limit = 2**23
    floored = floored_for_bias(scale, scale_d, bias, limit)
    assert floored.shape == scale.shape
    assert bool((floored >= scale).all())
    integers = integer_bias(bias, floored * torch.tensor(scale_d))
    assert float(integers.abs().max()) <= limit
    # Not larger than it has to be: a millionth covers the float32 roundings on the way.
    needed = bias.double().abs() / (limit * scale_d)
    needed = needed.max().reshape(1) if per_tensor else needed
    assert bool((floored.double() <= torch.maximum(scale.double(), needed * (1 + 1e-6))).all())


def test_floor_touches_only_the_channels_that_need_it() -> None:
    scale = torch.tensor([1e-3, 1e-7, 1e-3])
    bias = torch.tensor([0.5, 0.5, 0.0])
    floored = floored_for_bias(scale, 1e-3, bias, 2**23)
    assert floored[0] == scale[0]
    assert floored[2] == scale[2]
    assert floored[1].item() == pytest.approx(0.5 / 2**23 / 1e-3, rel=1e-5)


def test_one_large_bias_does_not_coarsen_a_layer_with_a_single_scale() -> None:
    scale, bias = torch.tensor([0.01]), torch.tensor([3000.0, 0.0])
    assert floored_for_bias(scale, 1e-3, bias, bias_limit(scale)) == scale
    # Per channel only the channel itself pays, so float32's exact range is kept.
    assert bias_limit(torch.tensor([0.01, 0.02])) == 2**23


@pytest.mark.parametrize("scale", [1e10, 1e30, 1e-12])
def test_fp16_scale_beyond_float16_is_finite_and_positive(scale: float) -> None:
    found = fp16_scale(scale)
    # The largest and smallest squares of normal float16 values bound it.
    assert 2.0**-28 <= found <= 65504.0**2


@given(st.floats(2.0**-14, 65504))
def test_fp16_scale_is_the_nearest_float16(scale: float) -> None:
    assert fp16_scale(scale) == float(np.float16(np.float32(scale)))


@given(st.one_of(st.floats(2.0**-23, 2.0**-14, exclude_max=True), st.floats(65600, 1e9)))
def test_fp16_scale_beyond_float16_is_the_square_of_one(scale: float) -> None:
    found = fp16_scale(scale)
    root = math.isqrt(int(Fraction(found) * 2**80)) / 2.0**40
    assert float(np.float16(root)) == root
    # A root off by half a float16 step, 2^-11 relative, is a square off by 2^-10.
    assert found == pytest.approx(scale, rel=2.0**-10 + 2.0**-20)
