import copy

import pytest
import torch

import amct_pytorch as amct
from amct_pytorch.errors import ModelError
from amct_pytorch.low_bit.deploy_conv import LowBitConv2d


def config(fmt="float8_e4m3fn", strategy="channel", batch_num=2):
    blocks = {
        "weights": {"type": fmt, "strategy": strategy},
        "inputs": {"type": fmt, "strategy": "tensor"},
    }
    return {"batch_num": batch_num, "quant_cfg": blocks, "algorithm": "ofmr"}


def network(dtype=torch.float32):
    torch.manual_seed(1)
    return (
        torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, stride=2, padding=1),
            torch.nn.ReLU(),
            torch.nn.Conv2d(8, 8, (3, 1), padding="same", groups=8, bias=False),
            torch.nn.Conv2d(8, 12, 3, dilation=2, groups=2),
            torch.nn.Flatten(),
            torch.nn.Linear(12 * 4 * 4, 5),
        )
        .to(dtype)
        .eval()
    )


def images(dtype=torch.float32):
    g = torch.Generator().manual_seed(2)
    return [torch.randn(4, 3, 16, 16, generator=g).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strategy", ["tensor", "channel"])
@pytest.mark.parametrize("fmt", ["float8_e4m3fn", "hifloat8"])
def test_convolutions_of_every_kind(fmt, strategy, dtype):
    float_net, net, data = network(dtype), network(dtype), images(dtype)
    amct.quantize(net, config(fmt, strategy))
    with torch.no_grad():
        meant = float_net(data[0])
        assert torch.equal(net(data[0]), meant)
        net(data[1])
        simulated = net(data[0])
        amct.convert(net)
        deployed = net(data[0])
    assert torch.equal(simulated, deployed) or dtype == torch.bfloat16
    error = (deployed.float() - meant.float()).square().sum() / meant.float().square().sum()
    # 3 mantissa bits: 31 dB a layer's operand; two operands and four layers add up to 22 dB.
    assert error < 10**-2.2
    for index in (0, 2, 3):
        layer = net[index]
        assert isinstance(layer, LowBitConv2d)
        assert layer.packed.dtype == torch.uint8
        assert layer.packed.numel() == layer.weight.numel()
    assert [entry.type for entry in net.amct_ledger.layers] == ["Conv2d"] * 3 + ["Linear"]
    assert "relative output error" in net.amct_ledger.layers[0].notes[-1]


def test_state_dict_and_casts_keep_the_codes():
    net = network()
    amct.quantize(net, config(batch_num=1))
    with torch.no_grad():
        net(images()[0])
    amct.convert(net)
    x = images()[1]
    other = copy.deepcopy(net)
    other[0].packed.zero_()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x))
    cast = copy.deepcopy(net).to(torch.bfloat16)
    assert cast[0].scale.dtype == torch.float32
    assert torch.equal(cast[0].packed, net[0].packed)
    assert cast(x.bfloat16()).dtype == torch.bfloat16


def test_an_image_without_batch_axis():
    net = torch.nn.Sequential(network()[0])
    amct.quantize(net, config(batch_num=1))
    image = images()[0][0]
    with torch.no_grad():
        net(image)
        batched = amct.convert(net)(image[None])[0]
        assert torch.equal(net(image), batched)


def test_other_padding_is_refused_before_anything_changes():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(ModelError, match="layer '0' has padding_mode 'reflect'; allowed is 'zer"):
        amct.quantize(net, config())
    assert type(net[0]) is torch.nn.Conv2d
