"""Kernels against the reference: one token and several, and inputs that are no numbers."""

import pytest
import torch
from torch import nn

import amct_pytorch as amct
from amct_pytorch.formats import FORMATS, Granularity
from amct_pytorch.low_bit import kernels
from amct_pytorch.low_bit.deploy_linear import LowBitLinear
from amct_pytorch.low_bit.kernels import BFLOAT16_TOLERANCE
from amct_pytorch.low_bit.reference import exact_linear
from amct_pytorch.low_bit.solution import InputQuantizer, LinearSolution, QuantizedTensor

INT8 = {"type": "int8", "symmetric": True, "strategy": "channel"}
BY_TOKEN = {"type": "int8", "symmetric": True, "strategy": "token"}
BY_TENSOR = {"type": "int8", "symmetric": True, "strategy": "tensor"}


def converted(weights, inputs=None, bias=True, columns=96):
    """A quantized layer of 64 outputs."""
    torch.manual_seed(11)
    net = nn.Sequential(nn.Linear(columns, 64, bias=bias))
    blocks = {"weights": weights} | ({} if inputs is None else {"inputs": inputs})
    amct.quantize(net, {"quant_cfg": blocks, "algorithm": "minmax"})
    with torch.no_grad():
        net(torch.randn(4, columns) + 0.3)
    amct.convert(net)
    return net[0]


@pytest.fixture
def integer_products(monkeypatch):
    """`_int_mm` runs wherever it is exact, fast or not."""
    if not kernels._int_mm_is_exact(torch.device("cpu")):
        pytest.skip("torch._int_mm is not exact on this processor")
    monkeypatch.setattr(kernels, "_int_mm_is_fast", lambda device: True)


def both(layer, x):
    """The output by a kernel, whose name is not the reference's, and by the reference."""
    with torch.inference_mode():
        layer.backend = "auto"
        fast = layer(x)
        assert layer.kernel != "reference"
        layer.backend = "reference"
        return fast, layer(x)


def hostile_tokens():
    """Ordinary inputs, and those at which scales or rounding are special."""
    x = torch.randn(8, 96)
    x[1] = 0
    x[2] *= 1e-12  # below the smallest scale
    x[3] = x[3].abs()
    x[4] = -x[4].abs()
    x[5] *= 1e30
    x[6, :] = torch.arange(96) - 48.5  # halves: ties under a scale of one
    x[7] = x[7].clamp(-1, 1)
    x[7, 0], x[7, 1] = 1.0, -1.0  # both ends alike
    return x


@pytest.mark.parametrize("weights", [INT8, {**INT8, "type": "int4"}], ids=["int8", "int4"])
@pytest.mark.parametrize(
    "inputs",
    [BY_TOKEN, BY_TENSOR, {**BY_TENSOR, "symmetric": False}],
    ids=["token", "tensor", "tensor with offset"],
)
def test_integer_products_of_one_token_are_those_of_the_reference(
    integer_products, weights, inputs
):
    layer = converted(weights, inputs)
    x = hostile_tokens()
    for token in x:
        fast, plain = both(layer, token.view(1, 1, -1))
        assert torch.equal(fast, plain)
    fast, plain = both(layer, x)
    assert torch.equal(fast, plain)


@pytest.mark.parametrize("inputs", [BY_TOKEN, BY_TENSOR], ids=["token", "tensor"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tokens", [1, 3])
def test_what_is_no_number_spoils_its_token_only(integer_products, inputs, value, tokens):
    layer = converted(INT8, inputs)
    x = torch.randn(tokens, 96)
    x[0, 5] = value
    fast, plain = both(layer, x)
    assert torch.equal(fast.isnan(), plain.isnan())
    assert torch.equal(fast.nan_to_num(), plain.nan_to_num())
    # A static scale has an end for infinity.
    assert bool(fast[0].isnan().all()) == (inputs is BY_TOKEN or value != value)
    assert not fast[1:].isnan().any()


@pytest.mark.parametrize("columns", [1, 257, 1024, 1025, 3000])
@pytest.mark.parametrize("ends", [(-128, 127), (-255, 255), (-(2**15), 2**15 - 1)])
def test_products_in_parts_are_exact(columns, ends):
    torch.manual_seed(13)
    x, weight = (torch.randint(ends[0], ends[1] + 1, (rows, columns)).double() for rows in (5, 7))
    x[0], weight[0] = ends[0], ends[0]  # the largest sum that there is
    x[1, ::2], x[1, 1::2] = ends
    largest = max(abs(end) for end in ends) ** 2
    found = exact_linear(x.float(), weight.float(), largest)
    assert torch.equal(found.long(), x.long() @ weight.long().T)


@pytest.mark.parametrize("columns", [96, 1100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs", [BY_TOKEN, BY_TENSOR], ids=["token", "tensor"])
def test_autocast_does_not_change_integer_sums(inputs, dtype, columns):
    layer = converted(INT8, inputs, columns=columns)
    layer.backend = "reference"
    x = torch.randn(3, columns)
    wanted = layer(x)
    with torch.autocast("cpu", dtype):
        found = layer(x)
    assert torch.equal(found, wanted)


def test_speed_is_measured_on_the_device_of_the_layer(monkeypatch):
    devices = set()

    def product(a, b):
        devices.update((a.device.type, b.device.type))
        return a.int() @ b.int()

    monkeypatch.setattr(kernels, "_int_mm", product)
    with torch.device("meta"):
        kernels._int_mm_is_fast.__wrapped__(torch.device("cpu"))
    assert devices == {"cpu"}


@pytest.mark.parametrize(
    "inputs",
    [BY_TOKEN, BY_TENSOR, {**BY_TENSOR, "symmetric": False}],
    ids=["token", "tensor", "tensor with offset"],
)
def test_sums_beyond_int32_are_right(integer_products, inputs):
    columns = 140_000
    net = nn.Sequential(nn.Linear(columns, 2)).eval()
    with torch.no_grad():
        net[0].weight.fill_(-1.0)
        net[0].bias.fill_(2.0)
        amct.quantize(
            net, {"quant_cfg": {"weights": INT8, "inputs": inputs}, "algorithm": "minmax"}
        )
        x = torch.full((2, columns), -1.0)
        wanted = net(x)
        amct.convert(net)
        assert torch.allclose(net(x), wanted)
        assert net[0].spec.bias == ("float32" if inputs is BY_TOKEN else "int32")


def test_slow_integer_products_are_left_to_float(monkeypatch):
    monkeypatch.setattr(kernels, "_int_mm_is_fast", lambda device: False)
    layer = converted(INT8, BY_TOKEN)
    x = torch.randn(3, 96)
    quick = layer(x)
    assert layer.kernel == "reference"
    layer.backend = "reference"
    assert torch.equal(quick, layer(x))


def test_an_integer_bias_leaves_room_for_the_sum(integer_products):
    net = nn.Sequential(nn.Linear(96, 2)).eval()
    weight_scale, input_scale = 2.0**-23, 1 / 127
    with torch.no_grad():
        net[0].weight.fill_(127 * weight_scale)
        net[0].bias.fill_((2.0**31 - 1000) * weight_scale * input_scale)
    amct.quantize(net, {"quant_cfg": {"weights": INT8, "inputs": BY_TENSOR}, "algorithm": "minmax"})
    x = torch.ones(3, 96)
    with torch.no_grad():
        wanted = net(x)
        amct.convert(net)
        assert torch.allclose(net(x), wanted, rtol=1e-5)


@pytest.mark.parametrize("fmt", [FORMATS["int8"], FORMATS["int4"]], ids=["int8", "int4"])
@pytest.mark.parametrize("beyond", [-1, 1])
def test_an_offset_beyond_its_format_is_refused(fmt, beyond):
    end = fmt.qmin if beyond < 0 else fmt.qmax
    codes, scale = torch.zeros(2, 8, dtype=torch.int8), torch.ones(2, 1)

    def solution(of_weight, of_inputs):
        offset = torch.tensor([[0], [of_weight]], dtype=torch.int32)
        weight = QuantizedTensor(codes, scale, offset, fmt, Granularity("channel"))
        offset = torch.tensor([of_inputs], dtype=torch.int32)
        inputs = InputQuantizer(fmt, Granularity("tensor"), torch.ones(1), offset)
        return LinearSolution(weight, inputs)

    LowBitLinear.of(solution(end, end), None, torch.float32)
    for which, offsets in (("weight", (end + beyond, 0)), ("inputs", (0, end + beyond))):
        with pytest.raises(amct.AmctError, match=f"{which}: an offset is {end + beyond}; allowed"):
            LowBitLinear.of(solution(*offsets), None, torch.float32)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "weights",
    [
        {"type": "int8", "strategy": "channel"},
        {"type": "int8", "strategy": "tensor"},
        {"type": "int4", "strategy": "channel"},
        {"type": "int4", "strategy": "tensor"},
        {"type": "int4", "strategy": "group", "group_size": 32},
    ],
    ids=lambda weights: f"{weights['type']} {weights['strategy']}",
)
def test_weight_only_is_near_the_reference(weights, symmetric, bias):
    layer = converted({**weights, "symmetric": symmetric}, bias=bias)
    for x in (torch.randn(1, 1, 96), torch.randn(3, 5, 96), torch.randn(5, 96)[1:2, :]):
        fast, plain = both(layer, x)
        assert fast.shape == (*x.shape[:-1], 64) and fast.dtype == x.dtype
        magnitudes = x.abs() @ layer.weight.abs().T
        if layer.bias is not None:
            magnitudes += layer.bias.abs()
        assert ((fast - plain).abs() <= BFLOAT16_TOLERANCE * magnitudes).all()


def test_scale_of_one_range_is_that_of_factors():
    fmt = FORMATS["int8"]
    torch.manual_seed(12)
    size = 2.0 ** torch.randint(-40, 100, (4000,))
    lo, hi = -torch.rand(4000) * size, torch.rand(4000) * size
    lo[:500], hi[500:1000], lo[1000:1500] = 0, 0, -hi[1000:1500]
    lo[1500:2000], hi[2000:2100] = hi[1500:2000] / 2, lo[2000:2100] / 2
    # Quotients to either side of the smallest scale.
    edge = 127 * 2.0**-23
    hi[2100:2400] = edge * (1 + torch.arange(-150, 150) * 2.0**-24)
    lo[2100:2400] = 0
    expected, _ = fmt.factors(lo, hi, symmetric=True)
    found = [fmt.symmetric_scale(a, b) for a, b in zip(lo.tolist(), hi.tolist(), strict=True)]
    assert torch.equal(torch.tensor(found), expected)
