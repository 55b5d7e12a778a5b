"""quantize, convert and algorithm_register: what they do, and what they refuse."""

import copy
import logging
import subprocess
import sys
import textwrap

import pytest
import torch
from pydantic import BaseModel
from torch import nn

import amct_pytorch as amct
from amct_pytorch.errors import (
    AmctError,
    ArgumentTypeError,
    ArgumentValueError,
    CalibrationError,
    ConfigError,
    ModelError,
)
from amct_pytorch.flows.low_bit import REGISTRY  # with the built-in algorithms
from amct_pytorch.low_bit.deploy_linear import LowBitLinear

W8 = {"weights": {"type": "int8"}}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Network(nn.Module):
    """Two blocks, a head, a convolution and an embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Embedding(11, 64)
        self.layers = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv1d(64, 64, 1)
        self.lm_head = nn.Linear(64, 11)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.conv(x.transpose(1, 2)).transpose(1, 2))


@pytest.fixture
def net():
    return Network().eval()


TOKENS = torch.arange(24).view(2, 12) % 11


def config(**changes):
    return {"quant_cfg": W8, "algorithm": "minmax", **changes}


def calibrate(net, batches=1):
    with torch.no_grad():
        for _ in range(batches):
            net(TOKENS)


def statuses(net):
    return {entry.name: entry.status for entry in net.amct_ledger.layers}


def test_the_model_is_changed_in_place_and_float_until_all_batches_are_seen(net):
    with torch.no_grad():
        meant = net(TOKENS)
    assert amct.quantize(net, config(batch_num=3, skip_layers="lm_head")) is None
    with torch.no_grad():
        outputs = [net(TOKENS) for _ in range(5)]
    assert all(torch.equal(y, meant) for y in outputs[:3])
    assert not torch.equal(outputs[3], meant)
    assert torch.equal(outputs[3], outputs[4])
    # 8-bit weights by channel: 40 dB and more.
    assert float((outputs[3] - meant).norm() / meant.norm()) < 0.01
    assert amct.convert(net) is net
    assert type(net.layers[0].up) is LowBitLinear
    assert type(net.lm_head) is nn.Linear
    assert statuses(net) == {
        "embed": "float", "conv": "float", "lm_head": "float",
        **{f"layers.{i}.{name}": "deployed" for i in (0, 1) for name in ("up", "down")},
    }  # fmt: skip
    told = str(net.amct_ledger)
    assert "lm_head: Linear stays float: skip_layers has 'lm_head'" in told
    assert "conv: Conv1d stays float: algorithm 'minmax' is for Linear" in told


@pytest.mark.parametrize("algorithm", ["minmax", {"minmax"}, ["minmax"], {"minmax": {}},
                                       {"minmax": None}], ids=str)  # fmt: skip
def test_all_spellings_of_the_algorithm(net, algorithm):
    amct.quantize(net, config(algorithm=algorithm))
    calibrate(net)
    assert all(entry.algorithm in ("minmax", None) for entry in net.amct_ledger.layers)
    assert len(net.amct_ledger.quantized) == 5


def test_no_config_means_int8_weights(net):
    amct.quantize(net)
    assert statuses(net)["lm_head"] == "float"
    assert {entry.weights for entry in net.amct_ledger.quantized} == {"int8 by channel"}


def test_the_last_override_that_matches_wins(net):
    group = {"type": "int4", "strategy": "group", "group_size": 32}
    blocks = {
        **W8,
        "layers.*.weights": group,
        "layers.1.down.weights": None,
        "*.up.weights": {"type": "int4", "symmetric": False},
        "lm_head.inputs": {"type": "int8", "strategy": "token"},
    }
    amct.quantize(net, config(quant_cfg=blocks))
    told = {entry.name: (entry.weights, entry.inputs) for entry in net.amct_ledger.quantized}
    assert told == {
        "layers.0.up": ("int4 by channel, asymmetric", None),
        "layers.1.up": ("int4 by channel, asymmetric", None),
        "layers.0.down": ("int4 by group of 32", None),
        "lm_head": ("int8 by channel", "int8 by token"),
    }
    reasons = {entry.name: entry.reason for entry in net.amct_ledger.layers}
    assert reasons["layers.1.down"] == "quant_cfg has no weights block for it"
    calibrate(net)
    amct.convert(net)
    assert net.layers[0].up.packed.shape == (128, 32)
    assert net.layers[0].down.scale.shape == (64, 4)


def test_enable_quant_false_leaves_inputs_alone(net):
    blocks = {**W8, "inputs": {"type": "int8", "enable_quant": False}}
    amct.quantize(net, config(quant_cfg=blocks))
    assert {entry.inputs for entry in net.amct_ledger.quantized} == {None}


def test_presets_are_everybodys_own(net):
    amct.INT8_SMOOTHQUANT_CFG["quant_cfg"]["weights"]["type"] = "spoiled"
    assert amct.INT8_SMOOTHQUANT_CFG["quant_cfg"]["weights"]["type"] == "int8"
    given = copy.deepcopy(amct.INT8_SMOOTHQUANT_CFG)
    before = copy.deepcopy(given)
    amct.quantize(net, given)
    assert given == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_models_stay_half(net, dtype):
    net = net.to(dtype)
    with torch.no_grad():
        meant = net(TOKENS)
    amct.quantize(net, config())
    calibrate(net)
    amct.convert(net)
    with torch.no_grad():
        found = net(TOKENS)
    assert found.dtype == dtype
    # bfloat16's own rounding is 2^-9 in each of five layers.
    assert float((found - meant).float().norm() / meant.float().norm()) < 0.02
    assert net.layers[0].up.scale.dtype == torch.float32


def test_a_model_with_tied_weights_keeps_its_embedding(net):
    net.lm_head.weight = net.embed.weight
    table = net.embed.weight.detach().clone()
    amct.quantize(net, config())
    calibrate(net)
    amct.convert(net)
    assert type(net.lm_head) is LowBitLinear
    assert torch.equal(net.embed.weight, table)


def test_training_mode_is_kept(net):
    net.train()
    amct.quantize(net, config())
    calibrate(net)
    amct.convert(net)
    assert all(module.training for module in net.modules())


# --- bad input ----------------------------------------------------------------------------------

BAD = {
    "config": (None, 3, "config is of type int; allowed are dict and None"),
    "key": ("batchnum", 1, "batchnum.: unknown key .did you mean 'batch_num'"),
    "batch_num 0": ("batch_num", 0, "batch_num is 0; allowed: an integer from 1"),
    "batch_num text": ("batch_num", "1", "batch_num is .1.; allowed: an integer from 1"),
    "batch_num bool": ("batch_num", True, "batch_num is true; allowed: an integer"),
    "no blocks": ("quant_cfg", {}, "quant_cfg is empty; allowed: a dict with the key weights"),
    "quant_cfg": ("quant_cfg", [1], r"quant_cfg is \[1\]; allowed: a dict"),
    "inputs only": ("quant_cfg", {"inputs": {"type": "int8"}}, "quant_cfg.weights is missing"),
    "block": ("quant_cfg", {"weight": {}}, "quant_cfg.weight: unknown key .did you mean 'weights'"),
    "type": ("quant_cfg", {"weights": {"type": "int9"}},
             "quant_cfg.weights.type is .int9.*did you mean 'int8'"),
    "input type": ("quant_cfg", {**W8, "inputs": {"type": "int4"}},
                   "quant_cfg.inputs.type is .int4.*allowed.*int8"),
    "no type": ("quant_cfg", {"weights": {}}, "quant_cfg.weights.type is missing"),
    "symmetric": ("quant_cfg", {"weights": {"type": "int8", "symmetric": 1}},
                  "quant_cfg.weights.symmetric is 1; allowed: true or false"),
    "strategy": ("quant_cfg", {"weights": {"type": "int8", "strategy": "row"}},
                 "quant_cfg.weights.strategy is .row.; allowed: \"tensor\", \"channel\""),
    "group_size missing": ("quant_cfg", {"weights": {"type": "int4", "strategy": "group"}},
                           "a group_size that is a multiple of 32, at least 32"),
    "group_size 48": (
        "quant_cfg", {"weights": {"type": "int4", "strategy": "group", "group_size": 48}},
        "a group_size that is a multiple of 32"),
    "group_size without group": ("quant_cfg", {"weights": {"type": "int4", "group_size": 32}},
                                 "no group_size with strategy \"channel\""),
    "group_size mx": (
        "quant_cfg", {"weights": {"type": "mxfp4_e2m1", "strategy": "group", "group_size": 64}},
        "group_size 32, the block of mx formats"),
    "group_size K": (
        "quant_cfg", {"weights": {"type": "int4", "strategy": "group", "group_size": 64}},
        r"layers.0.up, layers.1.up, lm_head: weights.group_size is 64; allowed with 64 inputs: a "
        r"multiple of 32 in \[32, 63\]"),
    "dynamic": ("quant_cfg", {**W8, "inputs": {"type": "int8", "dynamic": True}},
                "dynamic true only with strategy \"token\""),
    "override": ("quant_cfg", {**W8, "layer.*.weights": {"type": "int4"}},
                 r"quant_cfg.layer.\*.weights: no layer has such a name .did you mean 'layers.\*'"),
    "override of one layer": ("quant_cfg", {**W8, "layers.0.ups.weights": {"type": "int4"}},
                              "no layer has such a name .did you mean 'layers.0.up'"),
    "combination": (
        "quant_cfg", {"weights": {"type": "int8", "symmetric": False}, "inputs": {"type": "int8"}},
        "not allowed together: Linear: weights int8 .channel, asymmetric.*(.|\n)*allowed:(.|\n)*"
        "Linear: weights int8 .tensor/channel, symmetric"),
    "algorithm": ("algorithm", "gtpq", "algorithm is 'gtpq' .did you mean 'gptq'"),
    "algorithm missing": ("algorithm", None, "algorithm is None; allowed: the name of one"),
    "two algorithms": ("algorithm", ["minmax", "awq"], "allowed: the name of one algorithm"),
    "option": ("algorithm", {"awq": {"grid_num": 3}},
               "algorithm.awq.grid_num.*did you mean 'grids_num'"),
    "option value": ("algorithm", {"awq": {"grids_num": 0}}, "algorithm.awq.grids_num is 0"),
    "option of none": ("algorithm", {"minmax": {"foo": 1, "bar": 2}},
                       'algorithm.minmax has no options; given: "foo", "bar"'),
    "option text": ("algorithm", {"gptq": {"damping": "x"}},
                    r'gptq.damping is "x"; allowed: a number in \[0, 1\], default 0.01'),
    "option above": ("algorithm", {"gptq": {"sweeps": 101}},
                     r"gptq.sweeps is 101; allowed: an integer in \[0, 100\], default 1"),
    "options": ("algorithm", {"minmax": 3}, "algorithm.minmax is 3; allowed: a dict of options"),
    "skip_layers": ("skip_layers", 3, "skip_layers is 3; allowed: a str"),
    "skip all": ("skip_layers", [""], "skip_layers has the entry ..; allowed: parts of"),
    "nothing left": ("skip_layers", ["layers", "lm_head"],
                     "no layer is left to quantize:(.|\n)*layers.0.up: Linear stays float: "
                     "skip_layers has 'layers'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_configs_are_told_and_change_nothing(net, name):
    key, value, message = BAD[name]
    bad = value if key is None else config(**{key: value})
    before = dict(net.named_modules())
    with pytest.raises(AmctError, match=message) as caught:
        amct.quantize(net, bad)
    assert isinstance(caught.value, ArgumentTypeError if key is None else ConfigError)
    assert dict(net.named_modules()) == before
    assert not hasattr(net, "amct_ledger")


def test_several_mistakes_are_told_at_once(net):
    with pytest.raises(ConfigError) as caught:
        amct.quantize(net, {"batch_num": 0, "algorithm": "no", "quant_cfg": {"weights": 1}})
    for place in ("batch_num is 0", "algorithm is 'no'", "quant_cfg.weights is 1"):
        assert place in str(caught.value)


def test_skip_layers_that_match_nothing_are_told(net, caplog):
    caplog.set_level(logging.WARNING, "amct_pytorch")
    amct.quantize(net, config(skip_layers={"lm_heads"}))
    assert "no layer's name contains 'lm_heads' (did you mean 'lm_head'?)" in caplog.text


@pytest.mark.parametrize("preset", [None, "INT4_AWQ_WEIGHT_QUANT_CFG"])
@pytest.mark.parametrize("own", [False, True])
def test_what_a_preset_skips_is_told_only_where_the_config_is_the_users(caplog, preset, own):
    caplog.set_level(logging.WARNING, "amct_pytorch")
    net = nn.Sequential(nn.Linear(64, 64)).eval()
    given = None if preset is None else getattr(amct, preset)
    if own:
        given = {**(given or amct.INT8_MINMAX_WEIGHT_QUANT_CFG), "batch_num": 3}
    amct.quantize(net, given)
    assert ("no layer's name contains 'lm_head'" in caplog.text) == own


def test_wrong_models_are_told(net):
    with pytest.raises(ArgumentTypeError, match="model is of type dict"):
        amct.quantize({}, config())
    with pytest.raises(ModelError, match="the model itself is a Linear"):
        amct.quantize(nn.Linear(64, 64), config())
    with pytest.raises(ConfigError, match="no layer with weights"):
        amct.quantize(nn.Sequential(nn.ReLU()), config())
    with torch.device("meta"):
        empty = Network()
    with pytest.raises(ModelError, match=r"the weight of layer 'layers.0.up' is on the meta dev"):
        amct.quantize(empty, config())
    with torch.no_grad():
        net.layers[1].down.weight[3, 5] = torch.nan
    with pytest.raises(ModelError, match=r"the weight of layer 'layers.1.down' holds NaN"):
        amct.quantize(net, config())
    assert type(net.layers[0].up) is nn.Linear


@pytest.mark.parametrize(
    "again", [None, config(), config(quant_cfg={**W8, "layers.*.weights": None})]
)
def test_a_converted_model_is_told(net, again):
    amct.quantize(net, config())
    calibrate(net)
    amct.convert(net)
    told = "converted already: layers.0.up, layers.0.down, layers.1.up and 2 more layers; quantize"
    with pytest.raises(ModelError, match=told):
        amct.quantize(net, again)


def test_integer_layers_are_left_with_the_reason(net):
    net.lm_head.weight = nn.Parameter(net.lm_head.weight.to(torch.float64))
    net.lm_head.bias = nn.Parameter(net.lm_head.bias.to(torch.float64))
    amct.quantize(net, config())
    reason = {entry.name: entry.reason for entry in net.amct_ledger.layers}["lm_head"]
    assert reason == ("its parameters are torch.float64; allowed are float32, float16 and bfloat16")


def test_wrong_order_of_calls_is_told(net):
    with pytest.raises(ModelError, match="no quantize module; call quantize on it first"):
        amct.convert(net)
    with pytest.raises(ArgumentTypeError, match="model is of type NoneType"):
        amct.convert(None)
    amct.quantize(net, config(batch_num=2))
    with pytest.raises(ModelError, match="has quantize modules already; calibrate and convert"):
        amct.quantize(net, config())
    calibrate(net)
    with pytest.raises(CalibrationError) as caught:
        amct.convert(net)
    assert "layers.0.up has seen 1 of 2 batches" in str(caught.value)
    assert "lm_head has seen 1 of 2 batches" in str(caught.value)
    calibrate(net)
    amct.convert(net)
    with pytest.raises(ModelError, match="no quantize module"):
        amct.convert(net)


@pytest.mark.parametrize("algorithm", ["minmax", "gptq", "awq"])
def test_nan_in_activations_names_layer_and_batch(net, algorithm):
    amct.quantize(net, config(batch_num=2, algorithm=algorithm))
    calibrate(net)
    with torch.no_grad():
        net.embed.weight[4] = torch.nan
    message = r"input of layer 'layers.0.up' holds NaN or infinity in calibration batch 2"
    with pytest.raises(CalibrationError, match=message):
        calibrate(net)


# --- algorithms of the user's own -----------------------------------------------------------------


@pytest.fixture
def registry():
    """The registry as it was, afterwards."""
    before = dict(REGISTRY._algorithms)
    yield REGISTRY
    REGISTRY._algorithms.clear()
    REGISTRY._algorithms.update(before)


def test_the_documented_algorithm_runs_as_it_stands(net, registry):
    text = amct.BaseQuantizeModule.__doc__
    start = text.index("        import torch\n")
    end = text.index("    Batches are counted here")
    batch = TOKENS
    with torch.no_grad():
        meant = net(batch)
    exec(textwrap.dedent(text[start:end]), {"model": net, "batch": batch})
    assert type(net.lm_head).__name__ == "HalvesDeploy"
    assert statuses(net)["lm_head"] == "deployed"
    with torch.no_grad():
        found = net(batch)
    assert 0 < float((found - meant).norm() / meant.norm()) < 0.02


class Negated(amct.BaseQuantizeModule):
    """Returns the layer's negative once it is calibrated."""

    def __init__(self, ori_module, layer_name, quant_config):
        super().__init__(ori_module, layer_name, quant_config)
        self.ori_module, self.quant_config = ori_module, quant_config

    def forward(self, x):
        return -self.ori_module(x) if self.calibrated else self.ori_module(x)


class Strength(BaseModel):
    """Options without descriptions, and without a word on unknown keys."""

    strength: float = 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strenght": 1.0}, "algorithm.tuned.strenght: unknown key .did you mean 'strength'"),
        ({"strength": "a"}, 'algorithm.tuned.strength is "a"; allowed: a valid number'),
    ],
)
def test_options_of_a_registered_algorithm_are_checked(net, registry, options, message):
    class Tuned(Negated):
        Options = Strength

    amct.algorithm_register("tuned", "Conv1d", Tuned)
    with pytest.raises(AmctError, match=message):
        amct.quantize(net, config(algorithm={"tuned": options}))
    amct.quantize(net, config(algorithm={"tuned": {}}))
    assert net.conv.quant_config["algorithm"] == {"tuned": {"strength": 0.5}}


def test_a_registered_algorithm_is_not_told_to_be_uncalibrated_once_it_is(net, registry):
    amct.algorithm_register("negated", "Conv1d", Negated, OneDeploy)
    amct.quantize(net, config(algorithm="negated"))
    assert "calibrating, not calibrated yet" in str(net.amct_ledger)
    calibrate(net, 1)
    amct.convert(net)
    assert "conv: negated, weights int8 by channel, deployed, error not measured" in str(
        net.amct_ledger
    )


def test_without_deploy_module_the_quantize_module_stays(net, registry, caplog):
    caplog.set_level(logging.WARNING, "amct_pytorch")
    amct.algorithm_register("negated", "Conv1d", Negated)
    with torch.no_grad():
        meant = net(TOKENS) - net.lm_head.bias
    amct.quantize(net, config(algorithm={"negated": {"any": 3}}, batch_num=2))
    assert statuses(net)["layers.0.up"] == "float"
    calibrate(net, 2)
    amct.convert(net)
    assert "conv stays a Negated: it has no deploy module" in caplog.text
    assert net.conv.quant_config == {
        "batch_num": 2,
        "quant_cfg": {"weights": {"type": "int8", "symmetric": True, "strategy": "channel"}},
        "algorithm": {"negated": {"any": 3}},
    }
    assert net.conv.layer_name == "conv"
    with torch.no_grad():
        found = net(TOKENS) - net.lm_head.bias
    torch.testing.assert_close(found, -meant)


def test_a_name_registered_again_is_overridden_with_a_warning(net, registry, caplog):
    caplog.set_level(logging.WARNING, "amct_pytorch")
    amct.algorithm_register("minmax", "Linear", Negated)
    assert "algorithm 'minmax' for Linear was MinMaxLinear and is now Negated" in caplog.text
    amct.quantize(net, config())
    assert type(net.lm_head) is Negated


def test_a_registration_before_any_flow_is_logged_like_everything_else():
    script = (
        "import logging, amct_pytorch as amct\n"
        "assert not logging.getLogger('amct_pytorch').handlers\n"
        "class Own(amct.BaseQuantizeModule): pass\n"
        "amct.algorithm_register('minmax', 'Linear', Own)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert "WARNING [amct_pytorch] algorithm 'minmax' for Linear was" in done.stderr


class OneDeploy(nn.Module):
    def __init__(self, quant_module):
        super().__init__()
        self.bias = quant_module.ori_module.bias

    def forward(self, x):
        return x


class OtherDeploy(OneDeploy):
    pass


def test_two_algorithms_may_share_a_quantize_module(net, registry):
    amct.algorithm_register("one", "Conv1d", Negated, OneDeploy)
    amct.algorithm_register("two", "Conv1d", Negated, OtherDeploy)
    amct.algorithm_register("three", "Conv1d", Negated)
    for name, meant in (("one", OneDeploy), ("two", OtherDeploy), ("three", Negated)):
        copied = copy.deepcopy(net)
        amct.quantize(copied, config(algorithm=name))
        calibrate(copied)
        assert type(amct.convert(copied).conv) is meant


def test_a_refused_combination_is_told_once_with_its_layers_and_what_is_allowed(net):
    with pytest.raises(ConfigError) as caught:
        amct.quantize(net, config(algorithm="smoothquant"))
    text = str(caught.value)
    assert text.count("not allowed together") == 1
    assert "layers.0.up, layers.0.down, layers.1.up and 2 more layers: not allowed" in text
    assert "inputs int8 (token, symmetric); by minmax, smoothquant" in text


def test_layers_too_narrow_for_a_group_are_told_by_their_width():
    widths = (32, 96, 32, 96, 32, 32, 200)
    net = nn.Sequential(*(nn.Linear(width, 8) for width in widths))
    weights = {"type": "int4", "strategy": "group", "group_size": 128}
    with pytest.raises(ConfigError) as caught:
        amct.quantize(net, config(quant_cfg={"weights": weights}))
    first, *lines = str(caught.value).splitlines()
    assert first == "config: 2 problems"
    assert [line.partition(". Give")[0].strip() for line in lines] == [
        "0, 2, 4 and 1 more layer: weights.group_size is 128; allowed with 32 inputs: no groups",
        "1, 3: weights.group_size is 128; allowed with 96 inputs: a multiple of 32 in [32, 95]",
    ]


def test_an_override_inherits_nothing_and_a_last_group_may_be_shorter():
    net = nn.Sequential(nn.Linear(100, 8), nn.Linear(8, 8))
    base = {"type": "int4", "strategy": "group", "group_size": 64, "symmetric": False}
    amct.quantize(net, config(quant_cfg={"weights": base, "1.weights": {"type": "int8"}}))
    with torch.no_grad():
        net(torch.randn(4, 100))
    amct.convert(net)
    assert net[0].scale.shape == (8, 2)
    assert net[1].spec.weight.symmetric and net[1].scale.shape == (8, 1)


def test_attributes_of_the_base_class_are_none_until_set():
    module = amct.BaseQuantizeModule()
    for name in ("ori_module_type", "act_type", "wts_type", "scale_w", "scale_d", "offset_w",
                 "offset_d", "group_size", "scale", "clip_max"):  # fmt: skip
        assert getattr(module, name) is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3, "Linear", Negated), ArgumentTypeError, "name is of type int; allowed is str"),
        (("", "Linear", Negated), ArgumentValueError, "name is empty"),
        (("a", nn.Linear, Negated), ArgumentTypeError, "src_op is of type type; allowed is str"),
        (("a", "Linear", nn.Linear), ArgumentTypeError, "allowed is a subclass of BaseQuantize"),
        (("a", "Linear", Negated(None, "x", {})), ArgumentTypeError, "quant_op is Negated"),
        (("a", "Linear", Negated, int), ArgumentTypeError, "deploy_op is <class 'int'>; allowed"),
    ],
)
def test_wrong_registrations_are_told(registry, arguments, error, message):
    before = dict(registry._algorithms)
    with pytest.raises(error, match=message):
        amct.algorithm_register(*arguments)
    assert registry._algorithms == before


@pytest.mark.parametrize(
    ("src_op", "told"), [("Liner", "did you mean 'Linear'"), ("Conv1D", None), ("MyLayer", None)]
)
def test_a_layer_class_that_torch_does_not_have_is_told_if_it_looks_like_one(
    registry, src_op, told, caplog
):
    amct.algorithm_register("negated elsewhere", src_op, Negated)
    assert (told is None and not caplog.text) or (told is not None and told in caplog.text)
