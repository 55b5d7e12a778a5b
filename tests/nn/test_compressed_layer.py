"""The wrapper around one layer: the user's forward and attributes, the toolkit's operands."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amct_pytorch.graph.layers import LAYER_KINDS
from amct_pytorch.graph.weight_layout import WeightLayout
from amct_pytorch.nn.fuse_norm import SkippedNorm, fuse_norm
from amct_pytorch.nn.intercept import CallInterceptor, LayerCall
from amct_pytorch.nn.wrapped import CompressedLayer, replace_modules


class OddConv(nn.Conv2d):
    """A forward with an argument and work of its own."""

    flavour = "odd"

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, str]:
        y = F.conv2d(F.pad(x, (2, 0, 2, 0)), self.weight * 3, self.bias, self.stride)
        return y * scale, self.flavour


def wrap(layer: nn.Conv2d) -> CompressedLayer:
    return CompressedLayer("path.conv", LAYER_KINDS["Conv2d"], layer, layer.weight, layer.bias)


def test_forward_and_attributes_are_the_users() -> None:
    inner = OddConv(3, 5, 3, stride=2)
    layer = wrap(inner)
    x = torch.randn(1, 3, 7, 7)
    y, flavour = layer(x, scale=2.0)
    # The toolkit's weight is used, not the tripled one; padding, stride and scale stay.
    expected = F.conv2d(F.pad(x, (2, 0, 2, 0)), inner.weight, inner.bias, 2) * 2
    assert torch.equal(y, expected)
    assert flavour == "odd"
    assert (layer.stride, layer.in_channels, layer.flavour) == ((2, 2), 3, "odd")
    assert layer.weight is inner.weight
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = layer.no_such_thing


def test_a_layer_without_bias_gets_zeros() -> None:
    inner = nn.Conv2d(3, 5, 3, bias=False)
    layer = wrap(inner)
    assert layer.bias.tolist() == [0.0] * 5
    assert inner.bias is None
    x = torch.randn(1, 3, 7, 7)
    assert torch.equal(layer(x), inner(x))
    layer.bias.data += 1
    # float32 rounding of a sum and of adding one.
    torch.testing.assert_close(layer(x), inner(x) + 1, rtol=1e-5, atol=1e-6)


def test_changing_the_toolkits_bias_leaves_the_users() -> None:
    inner = nn.Conv2d(3, 5, 3)
    before = inner.bias.detach().clone()
    wrap(inner).bias.data += 1
    assert torch.equal(inner.bias, before)


def test_broadcast_shapes() -> None:
    layer = wrap(nn.Conv2d(2, 4, 3))
    values = torch.arange(4.0)
    assert layer.per_channel(values, torch.ones(1, 4, 5, 5)).shape == (1, 4, 1, 1)
    assert layer.per_output(values).shape == (4, 1, 1, 1)
    linear = nn.Linear(2, 4)
    layer = CompressedLayer("fc", LAYER_KINDS["Linear"], linear, linear.weight, None)
    assert layer.per_channel(values, torch.ones(3, 7, 4)).shape == (1, 1, 4)
    assert layer.per_output(values).shape == (4, 1)


def test_own_copy_hooks_of_the_users_module_are_not_borrowed() -> None:
    class Copying(nn.Conv2d):
        def __deepcopy__(self, memo: Any) -> "Copying":
            return Copying(2, 2, 1)

    layer = wrap(Copying(2, 2, 1))
    assert type(copy.deepcopy(layer)) is CompressedLayer


def test_the_users_hooks_run() -> None:
    inner = nn.Conv2d(2, 2, 1)
    seen = []
    inner.register_forward_hook(lambda *_: seen.append("ran"))
    wrap(inner)(torch.ones(1, 2, 3, 3))
    assert seen == ["ran"]


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        (("x", "w", "b", 2, 1), {}),
        (("x", "w"), {"bias": "b", "stride": 2, "padding": 1}),
        ((), {"input": "x", "weight": "w", "bias": "b", "padding": 1, "stride": 2}),
        (("x", "w", None, 2, 1), {}),
        (("x", "w"), {"stride": 2, "padding": 1}),
    ],
)
def test_operands_are_told_apart(args: Any, kwargs: Any) -> None:
    tensors = {
        "x": torch.randn(1, 2, 6, 6),
        "w": torch.randn(3, 2, 3, 3),
        "b": torch.randn(3),
    }
    args = tuple(tensors.get(a, a) if isinstance(a, str) else a for a in args)
    kwargs = {k: tensors.get(v, v) if isinstance(v, str) else v for k, v in kwargs.items()}
    call = LayerCall.bind(F.conv2d, args, kwargs)
    assert call.x is tensors["x"]
    assert call.weight is tensors["w"]
    assert call.bias is None or call.bias is tensors["b"]
    assert torch.equal(call.run(call.x, call.weight, call.bias), F.conv2d(*args, **kwargs))
    other = torch.randn(2, 2, 6, 6)
    expected = F.conv2d(other, tensors["w"], None, 2, 1)
    assert torch.equal(call.run(other, tensors["w"], None), expected)


def test_interceptor_answers_only_the_named_functions() -> None:
    x, w = torch.randn(2, 3), torch.randn(4, 3)
    with CallInterceptor(("linear",), lambda call: call.x):
        assert F.linear(x, w) is x
        assert torch.equal(F.relu(x), x.clamp(min=0))
        assert F.conv2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1)).sum() == 4
    assert F.linear(x, w).shape == (2, 4)


def test_skipped_norm_passes_its_operand_and_keeps_attributes() -> None:
    bn = nn.BatchNorm2d(3).eval()
    bn.running_mean.fill_(5.0)
    skipped = SkippedNorm(bn)
    x = torch.randn(1, 3, 2, 2)
    assert torch.equal(skipped(x), x)
    assert skipped.num_features == 3


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_fuse_norm_is_the_norm_of_the_layer(affine: bool, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    bn = nn.BatchNorm2d(4, affine=affine, eps=0.01).double().eval()
    conv = nn.Conv2d(2, 4, 3, bias=bias).double()
    bn.running_mean.normal_(generator=generator)
    bn.running_var.uniform_(0.1, 2, generator=generator)
    if affine:
        nn.init.normal_(bn.weight, generator=generator)
        nn.init.normal_(bn.bias, generator=generator)
    x = torch.randn(2, 2, 5, 5, generator=generator, dtype=torch.float64)
    weight, shift = fuse_norm(conv.weight, conv.bias, bn, WeightLayout(0))
    # float64 on both sides.
    torch.testing.assert_close(F.conv2d(x, weight, shift), bn(conv(x)), rtol=1e-12, atol=1e-12)
    transposed, _ = fuse_norm(conv.weight.transpose(0, 1), conv.bias, bn, WeightLayout(1))
    torch.testing.assert_close(transposed.transpose(0, 1), weight, rtol=0, atol=0)


def test_modules_are_replaced_wherever_they_are_held() -> None:
    old, new, other = nn.ReLU(), nn.Sigmoid(), nn.Tanh()
    model = nn.Sequential(old, nn.Sequential(old, other))
    model.order = [old, (other, [old])]
    model.table = {"a": {"b": old}}
    model.pair = (other, other)
    pair = model.pair
    replace_modules(model, {old: new})
    assert [model[0], model[1][0], model[1][1]] == [new, new, other]
    assert model.order == [new, (other, [new])]
    assert model.table == {"a": {"b": new}}
    assert model.pair is pair
    assert old not in set(model.modules())
