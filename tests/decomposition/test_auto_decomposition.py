"""auto_decomposition: what it changes in a model, what it leaves alone, what it writes."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from split_networks import DECOMPOSED, Net, image, trained
from torch import nn
from torch.nn.utils import parametrizations

import amct_pytorch as amct
from amct_pytorch.decomposition import measure as measuring
from amct_pytorch.tensor_decompose import auto_decomposition


def _conv(inputs: int = 64, outputs: int = 64, **options) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(inputs, outputs, options.pop("kernel_size", 3), **options)


def _reason(tmp_path, model, **options) -> str:
    """The reason why the model's only Conv2d was left alone."""
    _, changes = auto_decomposition(model, tmp_path / "net.json", **options)
    assert changes == {}
    assert not (tmp_path / "net.json").exists()
    (entry,) = json.loads((tmp_path / "net_ledger.json").read_text())["layers"]
    assert entry["status"] == "kept"
    return entry["reason"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_changes_names_and_structure():
    net = trained()
    same, changes = amct.auto_decomposition(net)
    assert same is net
    assert changes == {name: [f"{name}.0", f"{name}.1"] for name in DECOMPOSED}
    modules = dict(net.named_modules())
    for pieces in changes.values():
        assert [type(modules[piece]) for piece in pieces] == [nn.Conv2d, nn.Conv2d]
    assert list(net.tail._modules) == ["7", "2", "grouped", "dilated"]


def test_the_result_is_close_where_weights_are_nearly_of_low_rank():
    net, x = trained(), image()
    expected = net(x)
    amct.auto_decomposition(net, rank_policy="energy", energy=0.97)
    assert (net(x) - expected).norm() < 0.2 * expected.norm()


def test_a_second_call_changes_nothing():
    net = trained()
    amct.auto_decomposition(net)
    before = list(net.state_dict())
    assert amct.auto_decomposition(net)[1] == {}
    assert list(net.state_dict()) == before


def test_the_same_call_gives_the_same_weights_and_leaves_the_random_state():
    first, third = trained(), trained()
    second = copy.deepcopy(first)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    amct.auto_decomposition(first)
    amct.auto_decomposition(third, input_data=image())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    amct.auto_decomposition(second)
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_bare_layer_comes_back_as_a_new_module(tmp_path):
    conv = _conv(bias=True)
    weight = conv.weight.detach().clone()
    row, changes = auto_decomposition(conv, tmp_path / "net.json")
    assert changes == {"": ["0", "1"]}
    assert isinstance(row, nn.Sequential)
    assert torch.equal(conv.weight, weight)
    again, changes = amct.decompose_network(_conv(bias=True), tmp_path / "net.json")
    again.load_state_dict(row.state_dict())
    x = torch.randn(1, 64, 8, 8)
    assert torch.equal(again(x), row(x))
    assert changes == {"": ["0", "1"]}


def test_the_ledger_tells_what_happened_to_every_layer(tmp_path):
    net = trained()
    amct.auto_decomposition(net, tmp_path / "deep" / "net.json", input_data=image())
    ledger = json.loads((tmp_path / "deep" / "net_ledger.json").read_text())
    by_name = {entry["name"]: entry for entry in ledger["layers"]}
    assert list(by_name) == [n for n, m in Net().named_modules() if isinstance(m, nn.Conv2d)]
    assert "groups is 2" in by_name["tail.grouped"]["reason"]
    assert "dilation is (2, 2)" in by_name["tail.dilated"]["reason"]
    assert "kernel is (1, 1)" in by_name["head"]["reason"]
    wide = by_name["stages.3x3 wide"]
    assert wide["input_shape"] == [2, 64, 24, 20]
    assert wide["flops_before"] == 2 * 128 * 64 * 9 * 12 * 10
    if wide["status"] == "decomposed":
        assert wide["milliseconds_after"] < wide["milliseconds_before"]
        assert wide["flops_after"] < wide["flops_before"]
        assert wide["parameters_after"] < wide["parameters_before"]
        assert 0 < wide["error"] < 0.5
    assert ledger["flops_of"] == "one sample of input_data"
    assert ledger["totals"]["parameters_before"] == sum(
        sum(p.numel() for p in m.parameters()) for m in Net().modules() if isinstance(m, nn.Conv2d)
    )


def test_a_layer_that_gets_slower_is_left_alone(tmp_path, monkeypatch):
    module = "amct_pytorch.flows.decomposition.measure"
    monkeypatch.setattr(module, lambda conv, row, shape: (1.0, 1.5))
    model = nn.Sequential(_conv())
    reason = _reason(tmp_path, model, input_data=torch.zeros(1, 64, 9, 9))
    assert "slower" in reason
    assert isinstance(model[0], nn.Conv2d)


def test_latency_is_measured_without_hooks_or_traces():
    conv = _conv()
    conv.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    before, after = measuring.measure(conv, nn.Sequential(conv, nn.Identity()), (1, 64, 9, 9))
    assert before > 0
    assert after > 0


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (_conv(groups=2), "groups is 2"),
        (_conv(dilation=2), "dilation is"),
        (_conv(stride=3), "stride is"),
        (_conv(kernel_size=(3, 2)), "both sides"),
        (_conv(32, 64), "too narrow: it has 32 channels on one side; a split pays from 64 on"),
        (_conv(1, 64, kernel_size=7), "too small"),
        (parametrizations.weight_norm(_conv()), "ParametrizedConv2d|computed"),
        (nn.utils.spectral_norm(_conv()), "computed or masked"),
        (_conv().to("meta"), "meta device"),
    ],
)
def test_layers_that_are_not_eligible(tmp_path, conv, reason):
    import re

    assert re.search(reason, _reason(tmp_path, nn.Sequential(conv)))


def test_subclasses_with_a_forward_of_their_own_are_left_alone(tmp_path):
    class Standardised(nn.Conv2d):
        def forward(self, x):
            weight = self.weight - self.weight.mean()
            return nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding)

    class Named(nn.Conv2d):
        """Nothing of its own but a name."""

    assert "forward of its own" in _reason(tmp_path, nn.Sequential(Standardised(64, 64, 3)))
    assert list(auto_decomposition(nn.Sequential(Named(64, 64, 3)))[1]) == ["0"]
    patched = _conv()
    patched.forward = lambda x: x
    assert "forward of its own" in _reason(tmp_path, nn.Sequential(patched))


def test_reused_layers_are_left_alone(tmp_path):
    conv, tied = _conv(), _conv()
    assert "reused" in _reason(tmp_path, nn.ModuleDict({"a": conv, "b": conv}))
    tied.weight = conv.weight
    model = nn.Sequential(conv, tied)
    assert auto_decomposition(model)[1] == {}

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = _conv(padding=1)

        def forward(self, x):
            return self.conv(self.conv(x))

    class ReadsWeight(Twice):
        def forward(self, x):
            return nn.functional.conv2d(x, self.conv.weight)

    x = torch.zeros(1, 64, 9, 9)
    assert "ran 2 times" in _reason(tmp_path, Twice(), input_data=x)
    assert "weight directly" in _reason(tmp_path, ReadsWeight(), input_data=x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(dtype):
    net, x = trained().to(dtype), image().to(dtype)
    expected = net(x)
    _, changes = amct.auto_decomposition(net, rank_policy="energy", energy=0.97)
    assert set(changes) <= set(DECOMPOSED)
    assert changes
    assert {parameter.dtype for parameter in net.parameters()} == {dtype}
    assert (net(x) - expected).float().norm() < 0.2 * expected.float().norm()


def test_training_flag_gradients_and_hooks_are_kept():
    net = trained().train()
    net.tail.eval()
    net.tail[0].weight.requires_grad_(False)
    seen = []
    handle = net.stages["items-2"].register_forward_hook(lambda m, i, o: seen.append(o.shape))
    net.stages["items-2"].register_forward_pre_hook(lambda m, i: seen.append(i[0].shape))
    net.stages["items-2"].register_full_backward_hook(lambda m, gi, go: seen.append("back"))
    flags = {name: module.training for name, module in net.named_modules()}
    amct.auto_decomposition(net)
    for name, module in net.named_modules():
        assert module.training == flags.get(name, flags[name.rpartition(".")[0] or name])
    assert [p.requires_grad for p in net.tail[0].parameters()] == [False, False, True]
    net(image()).sum().backward()
    assert seen == [(2, 128, 12, 10), (2, 96, 12, 10), "back"]
    handle.remove()
    net(image())
    assert len(seen) == 4


def test_modules_kept_in_plain_lists_are_exchanged_too():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = _conv(padding=1)
            self.order = [self.conv, torch.relu]

        def forward(self, x):
            for step in self.order:
                x = step(x)
            return x

    net = Listed()
    amct.auto_decomposition(net)
    assert net.order[0] is net.conv
    assert isinstance(net.conv, nn.Sequential)


def test_patterns_choose_layers():
    everything = DECOMPOSED
    assert list(amct.auto_decomposition(trained(), include="stages.*")[1]) == everything[1:3]
    assert list(amct.auto_decomposition(trained(), exclude=["st*"])[1]) == everything[3:]


def test_the_result_trains_under_ddp(tmp_path):
    net = trained().train()
    amct.auto_decomposition(net)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        ddp = nn.parallel.DistributedDataParallel(net)
        with pytest.raises(amct.AmctError, match="DistributedDataParallel"):
            amct.auto_decomposition(ddp)
        for _ in range(2):  # the second pass fails if a parameter got no gradient
            ddp(image()).sum().backward()
        assert all(p.grad is not None for p in net.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_a_failed_write_leaves_the_model_as_it_was(tmp_path):
    net = trained()
    before = copy.deepcopy(net.state_dict())
    (tmp_path / "file").write_text("")
    with pytest.raises(amct.AmctError, match="decompose_info_path"):
        amct.auto_decomposition(net, tmp_path / "file" / "net.json")
    assert list(net.state_dict()) == list(before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_policy": "vmbf"}, "rank_policy is \"vmbf\".*vbmf, energy, flops.*'vbmf'"),
        ({"rank_policy": 3}, "rank_policy is a int"),
        ({"energy": 1.5}, "energy is 1.5; allowed is 0 < energy <= 1"),
        ({"energy": float("nan")}, "energy is nan"),
        ({"flops_ratio": 0}, "flops_ratio is 0"),
        ({"minimum_saving": "much"}, "minimum_saving is a str"),
        ({"rank_bounds": 1}, "rank_bounds is a int"),
        ({"tucker": None}, "tucker is a NoneType"),
        ({"include": ["stages.3x3 wid"]}, "include pattern.*matches no.*'stages.3x3 wide'"),
        ({"exclude": 5}, "exclude is a int"),
        ({"exclude": [5]}, "exclude holds a int"),
        ({"input_data": 5}, "input_data is a int"),
        ({"rank_polcy": "vbmf"}, "'rank_polcy'.*'rank_policy'"),
    ],
)
def test_wrong_options_are_explained(tmp_path, options, message):
    net = trained()
    before = list(net.state_dict())
    with pytest.raises(amct.AmctError, match=message):
        amct.auto_decomposition(net, tmp_path / "net.json", **options)
    assert list(net.state_dict()) == before
    assert not (tmp_path / "net.json").exists()


def test_wrong_models_are_explained():
    with pytest.raises(TypeError, match="model is a dict"):
        amct.auto_decomposition({})
    with pytest.raises(amct.AmctError, match="scripted"):
        amct.auto_decomposition(torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3))))
    with pytest.raises(amct.AmctError, match="cannot be run on input_data"):
        amct.auto_decomposition(trained(), input_data=torch.zeros(1, 5, 9, 9))
    with pytest.raises(amct.AmctError, match="lazy layer"):
        amct.auto_decomposition(nn.Sequential(nn.LazyConv2d(64, 3)))


def test_a_stale_info_file_is_named(tmp_path, caplog):
    (tmp_path / "net.json").write_text("[]")
    amct.auto_decomposition(nn.Sequential(nn.Linear(3, 4)), tmp_path / "net.json")
    assert "earlier run" in caplog.text
    assert "no Conv2d" in caplog.text
