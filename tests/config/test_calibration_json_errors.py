"""Each thing a calibration JSON file can get wrong, and the words for it."""

import pytest
from config_cases import LAYERS, REUSED, load

from amct_pytorch.config.calibration_json import load_calibration_json
from amct_pytorch.config.defaults import default_calibration_config
from amct_pytorch.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    ConfigError,
    FileMissingError,
)

ACT, WTS = "activation_quant_params", "weight_quant_params"


def refused(tmp_path, document) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, document)
    text = str(caught.value)
    assert text.startswith(str(tmp_path / "quant.json"))
    assert isinstance(caught.value, ValueError)
    return text


GLOBALS = [
    ("version", 2, "allowed: 1"),
    ("version", True, "version is true"),
    ("version", 1.0, "version is 1.0"),
    ("batch_num", 0, "batch_num is 0; allowed: an integer >= 1"),
    ("batch_num", -1, "an integer >= 1"),
    ("batch_num", 1.5, "batch_num is 1.5"),
    ("batch_num", True, "batch_num is true"),
    ("batch_num", "1", 'batch_num is "1"'),
    ("batch_num", None, "batch_num is null"),
    ("activation_offset", 1, "activation_offset is 1; allowed: true or false"),
    ("do_fusion", "true", 'do_fusion is "true"; allowed: true or false'),
    ("bias_correction", 0, "true or false"),
    ("fakequant_precision_mode", "FORCE_FP16", "did you mean 'FORCE_FP16_QUANT'?"),
    ("fakequant_precision_mode", None, "fakequant_precision_mode is null"),
    ("skip_fusion_layers", "conv1", 'skip_fusion_layers is "conv1"; allowed: a list'),
    ("skip_fusion_layers", [1], "skip_fusion_layers[0] is 1"),
    ("skip_fusion_layers", ["cnv1"], "skip_fusion_layers: cnv1: the model has no such module"),
    ("skip_fusion_layers", ["cnv1"], "did you mean 'conv1'?"),
]


@pytest.mark.parametrize(("key", "value", "words"), GLOBALS)
def test_globals(tmp_path, key, value, words):
    assert words in refused(tmp_path, {key: value})


IFMR = [
    ("search_step", 0, "search_step is 0; allowed: a number in (0, end - start of search_range]"),
    ("search_step", 0.61, "a number in (0, 0.6], end - start of search_range"),
    ("search_step", "0.1", 'search_step is "0.1"'),
    ("search_range", [1.3, 0.7], "[start, end] with 0 < start < end"),
    ("search_range", [0, 1], "[start, end] with 0 < start < end"),
    ("search_range", [1], "search_range is [1]; allowed: [start, end]"),
    ("search_range", [1, 2, 3], "search_range is [1, 2, 3]"),
    ("search_range", 1, "search_range is 1;"),
    ("search_range", [1, "2"], 'search_range[1] is "2"'),
    ("search_range", [1, True], "search_range[1] is true"),
    ("search_range", [0.7, 0.705], "search_step is 0.01; allowed: a number in (0, 0.005]"),
    ("max_percentile", 0.5, "max_percentile is 0.5; allowed: a number in (0.5, 1]"),
    ("min_percentile", 1.01, "min_percentile is 1.01"),
    ("max_percentile", float("nan"), "max_percentile is NaN"),
    ("search_range", [1, float("inf")], "search_range[1] is Infinity"),
    ("num_bits", 16, "num_bits is 16; allowed: 8 (16 is not supported in this version)"),
    ("num_bits", 8.0, "num_bits is 8.0"),
    ("asymmetric", "yes", "asymmetric is"),
    ("asymmetric", None, "asymmetric is null; allowed: true or false"),
    ("act_algo", "ifm", """act_algo is "ifm"; allowed: "ifmr" or "hfmg" (did you mean 'ifmr'?)"""),
    ("act_algo", None, "act_algo is null"),
    ("act_algo", {"a": 1}, 'act_algo is {"a": 1}'),
    ("act_algo", 8, "act_algo is 8"),
    ("act_algo", ["ifmr"], 'act_algo is ["ifmr"]'),
    ("num_of_bins", 4096, 'num_of_bins: unknown key; it belongs to act_algo "hfmg"'),
    ("max_percentil", 0.9, "max_percentil: unknown key (did you mean 'max_percentile'?)"),
    ("zzz", 0.9, "zzz: unknown key; allowed: act_algo, num_bits"),
]


@pytest.mark.parametrize(("key", "value", "words"), IFMR)
def test_ifmr(tmp_path, key, value, words):
    text = refused(tmp_path, {"conv1": {ACT: {"num_bits": 8, key: value}}})
    assert words in text
    assert f"conv1.{ACT}." in text


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_of_bins", 4095, "num_of_bins is 4095; allowed: 1024, 2048, 4096 or 8192"),
        ("search_step", 0.1, 'search_step: unknown key; it belongs to act_algo "ifmr"'),
    ],
)
def test_hfmg(tmp_path, key, value, words):
    params = {"act_algo": "hfmg", "num_bits": 8, key: value}
    assert f"conv1.{ACT}.{words}" in refused(tmp_path, {"conv1": {ACT: params}})


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"num_bits": 5}, "num_bits is 5; allowed: 8, 7, 6 or 4"),
        ({"num_bits": 16}, "num_bits is 16"),
        ({"channel_wise": True}, "num_bits is missing; allowed: 8, 7, 6 or 4"),
        ({"num_bits": 8, "channel_wise": 1}, "channel_wise is 1"),
        ({"num_bits": 8, "channel_wise": None}, "channel_wise is null"),
        ({"num_bits": 8, "reg_param": 0.1}, 'reg_param: unknown key; it belongs to wts_algo "ada'),
        ({"num_bits": 8, "wts_algo": "arq"}, 'wts_algo is "arq"; allowed: "arq_quantize" or "ada'),
    ],
)
def test_weights(tmp_path, params, words):
    assert f"conv1.{WTS}.{words}" in refused(tmp_path, {"conv1": {WTS: params}})


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_iteration", -1, "num_iteration is -1; allowed: an integer >= 0"),
        ("reg_param", 1, "reg_param is 1; allowed: a number in (0, 1)"),
        ("warm_start", 0, "warm_start is 0; allowed: a number in (0, 1)"),
        (
            "beta_range",
            [2, 20],
            "beta_range is [2, 20]; allowed: [start, end] with start > end > 0",
        ),
        (
            "beta_range",
            [20, 0],
            "beta_range is [20, 0]; allowed: [start, end] with start > end > 0",
        ),
    ],
)
def test_ada(tmp_path, key, value, words):
    params = {"wts_algo": "ada_quantize", "num_bits": 8, key: value}
    assert f"conv1.{WTS}.{words}" in refused(tmp_path, {"conv1": {WTS: params}})


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"conv1": 3}, "conv1 is 3; allowed: an object"),
        ({"conv1": {ACT: []}}, f"conv1.{ACT} is []; allowed: an object"),
        ({"conv1": {WTS: None}}, f"conv1.{WTS} is null; allowed: an object"),
        ({"conv1": {"quant_enable": 1}}, "conv1.quant_enable is 1; allowed: true or false"),
        ({"conv1": {"quant_enabled": True}}, "did you mean 'quant_enable'?"),
        ({"conv1": {"dmq_balancer_param": 0.1}}, "dmq_balancer_param is 0.1; allowed: a number in"),
        ({"conv1": {"dmq_balancer_param": None}}, "conv1.dmq_balancer_param is null"),
        ({"cnv1": {}}, "cnv1: the model has no such layer (did you mean 'conv1'?)"),
        ({"bn1": {}}, "bn1: the model has it, but it is not of a type that is quantized"),
        ({"bach_num": 3}, "bach_num: unknown key (did you mean 'batch_num'?)"),
        ({"shared": {}}, f"shared: cannot be quantized: {REUSED}"),
        (
            {"fc": {WTS: {"num_bits": 8, "channel_wise": True}}},
            f"fc.{WTS}.channel_wise is true, which is not allowed: Linear has one scale",
        ),
        (
            {"fc": {WTS: {"num_bits": 7}}},
            f"fc.{WTS}.num_bits is 7, which is not allowed: 6 and 7 bits are for Conv2d only",
        ),
    ],
)
def test_layers(tmp_path, document, words):
    assert words in refused(tmp_path, document)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"conv1": {},\n "fc": }', "line 2, column 8"),
        ("", "line 1, column 1"),
        ("[]", "allowed: a JSON object"),
        ("3", "allowed: a JSON object"),
        ('{"conv1": {}, "conv1": {}}', "conv1: the key is there more than once"),
        ('{"batch_num": 1, "batch_num": 1}', "batch_num: the key is there more than once"),
        (
            '{"conv1": {"weight_quant_params": {"num_bits": 8, "num_bits": 8}}}',
            f"conv1.{WTS}.num_bits: the key is there more than once",
        ),
        ('{"batch_num": ' + "9" * 5000 + "}", "digits"),
        ('{"conv1": ' + "[" * 100_000, "recursion"),
        ('{"conv1": ' + "[" * 400 + "]" * 400 + "}", "conv1 is [[["),
        ('{"batch_num": 1e999}', "batch_num is Infinity"),
    ],
)
def test_text(tmp_path, text, words):
    assert words in refused(tmp_path, text)


def test_all_problems_are_told_at_once(tmp_path):
    document = {
        "batch_num": 0,
        "conv1": {ACT: {"num_bits": 8, "search_step": 9, "max_percentile": 2}, WTS: {}},
        "fc": {WTS: {"num_bits": 6, "channel_wise": True}},
        "shared": {},
        "nothing": {},
    }
    text = refused(tmp_path, document)
    assert "8 problems" in text
    places = ["batch_num", "search_step", "max_percentile", "num_bits", "fc", "shared", "nothing"]
    assert all(place in text for place in places)


def test_but_no_more_than_ten(tmp_path):
    text = refused(tmp_path, {f"nothing{i}": {} for i in range(12)})
    assert "12 problems" in text
    assert "nothing9:" in text
    assert "nothing10:" not in text
    assert text.endswith("and 2 more")


def test_a_missing_file(tmp_path):
    with pytest.raises(FileMissingError, match=r"config_file.*none\.json"):
        load_calibration_json(tmp_path / "none.json", [], [])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"batch_num": 0}, ArgumentValueError, "batch_num is 0; allowed: an integer >= 1"),
        ({"batch_num": True}, ArgumentTypeError, "batch_num is true"),
        ({"batch_num": 1.0}, ArgumentTypeError, "batch_num is 1.0"),
        ({"activation_offset": 1}, ArgumentTypeError, "activation_offset is 1"),
        ({"skip_layers": "fc"}, ArgumentTypeError, 'skip_layers is "fc"; allowed: a list of str'),
        ({"skip_layers": [3]}, ArgumentTypeError, "skip_layers"),
        ({"skip_layers": ["cnv1"]}, ArgumentValueError, "skip_layers: cnv1: the model has no"),
        ({"skip_layers": ["cnv1"]}, ArgumentValueError, "did you mean 'conv1'?"),
    ],
)
def test_arguments_of_the_default_config(arguments, error, words):
    with pytest.raises(error) as caught:
        default_calibration_config(LAYERS, **arguments)
    assert words in str(caught.value)
