"""The config of quantization-aware training, as JSON and from a .cfg."""

import json

import pytest
from config_cases import RETRAIN_LAYERS as LAYERS
from config_cases import REUSED
from config_cases import load_retrain as load
from config_cases import retrain_from_cfg as from_cfg

from amct_pytorch.config.layered_json import dump_layered
from amct_pytorch.config.retrain_json import (
    default_retrain_config,
    tell_of_layers,
)
from amct_pytorch.errors import ConfigError

ON = "retrain_data_quant_config {} "


def test_the_file_has_the_layers_in_the_models_order_and_every_key_in_its_place():
    text = dump_layered(default_retrain_config(LAYERS))
    document = json.loads(text)
    assert list(document) == [
        "version",
        "batch_num",
        "stem",
        "head",
        "body.conv",
        "body.depthwise",
    ]
    assert document["head"] == {
        "retrain_enable": True,
        "retrain_data_config": {"algo": "ulq_quantize", "dst_type": "INT8"},
        "retrain_weight_config": {
            "algo": "arq_retrain",
            "channel_wise": False,
            "dst_type": "INT8",
        },
    }
    assert document["stem"]["retrain_weight_config"]["channel_wise"] is True
    assert text.startswith('{\n    "version": 1,\n    "batch_num": 1,\n')


def test_what_is_dumped_is_loaded(tmp_path):
    config = from_cfg(
        tmp_path,
        """batch_num: 3 fakequant_precision_mode: FORCE_FP16_QUANT
        retrain_data_quant_config { ulq_quantize {
          clip_max_min { clip_max: 2.5 clip_min: -0.7 } fixed_min: false dst_type: INT4 } }
        retrain_weight_quant_config { ulq_retrain { channel_wise: false } }
        skip_layers: "head" """,
    )
    assert load(tmp_path, dump_layered(config)) == config
    layer = json.loads(dump_layered(config))["stem"]
    assert layer["retrain_data_config"] == {
        "algo": "ulq_quantize",
        "dst_type": "INT4",
        "clip_max": 2.5,
        "clip_min": -0.7,
        "fixed_min": False,
    }
    assert layer["retrain_weight_config"] == {
        "algo": "ulq_retrain",
        "channel_wise": False,
        "dst_type": "INT8",
    }


def test_every_key_has_a_default(tmp_path):
    default = default_retrain_config(LAYERS)
    names = {name: {} for name in default.layers}
    assert load(tmp_path, names) == default
    assert list(load(tmp_path, dict(reversed(names.items()))).layers) == list(default.layers)


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        (
            {"retrain_data_config": {"dst_type": "INT16"}},
            r'stem.retrain_data_config.dst_type is "INT16"; allowed: "INT8" or "INT4" \(INT16 is '
            r"reserved for a later version\)",
        ),
        (
            {"retrain_data_config": {"clip_max": -1.0, "clip_min": -2.0}},
            "stem.retrain_data_config.clip_max is -1.0; allowed: a number > 0",
        ),
        (
            {"retrain_data_config": {"clip_max": 1.0, "clip_min": 0.5}},
            "stem.retrain_data_config.clip_min is 0.5; allowed: a number < 0",
        ),
        ({"retrain_data_config": {"clip_max": 1.0}}, "clip_max together with clip_min"),
        ({"retrain_data_config": {"clip_min": -1.0}}, "clip_min together with clip_max"),
        (
            {"retrain_weight_config": {"algo": "arq_retrian"}},
            "stem.retrain_weight_config.algo is .*did you mean 'arq_retrain'",
        ),
        ({"retrain_enabled": True}, "stem.retrain_enabled: unknown key.*'retrain_enable'"),
        ([], r"stem is \[\]; allowed: an object"),
    ],
)
def test_wrong_values_are_told_with_their_place(tmp_path, layer, told):
    with pytest.raises(ConfigError, match=told):
        load(tmp_path, {"stem": layer})


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ({"batch_num": 0, "stem": {}}, "batch_num is 0; allowed: an integer >= 1"),
        ({"batchnum": 1, "stem": {}}, "batchnum: unknown key.*'batch_num'"),
        ({"stam": {}}, "stam: the model has no such layer.*'stem'"),
        ({"norm": {}}, "norm: the model has it, but"),
        ({"shared": {}}, f"shared: cannot be quantized: {REUSED}"),
        ({"volume": {}}, "Conv3d is not trained; such are Conv1d, Conv2d, ConvTranspose1d, "),
        (
            {"head": {"retrain_weight_config": {"channel_wise": True}}},
            "head.retrain_weight_config.channel_wise is true, which is not allowed: Linear has one",
        ),
        ({"stem": {"retrain_enable": False}}, "no layer is enabled"),
        ('{"stem": {}, "stem": {}}', "stem: the key is there more than once"),
        ("{", "line 1, column 2"),
    ],
)
def test_what_the_model_does_not_allow_is_told(tmp_path, document, told):
    with pytest.raises(ConfigError, match=told):
        load(tmp_path, document)


def test_a_layer_that_cannot_be_trained_may_stand_in_the_file_switched_off(tmp_path):
    config = load(tmp_path, {"stem": {}, "shared": {"retrain_enable": False}})
    assert list(config.enabled_layers()) == ["stem"]


def test_skip_lists_are_joined(tmp_path):
    config = from_cfg(
        tmp_path,
        ON + 'skip_layers: "stem" quant_skip_layers: "body.conv" quant_skip_types: "Linear"',
    )
    assert list(config.enabled_layers()) == ["body.depthwise"]
    assert config.layers["head"].retrain_enable is False
    config = from_cfg(tmp_path, ON + 'skip_layer_types: "Conv2d"')
    assert list(config.enabled_layers()) == ["head"]


def test_an_override_by_name_beats_one_by_type_beats_the_global_block(tmp_path):
    config = from_cfg(
        tmp_path,
        """retrain_data_quant_config { ulq_quantize { dst_type: INT4 } }
        override_layer_types { layer_type: "Conv2d"
          retrain_weight_quant_config { ulq_retrain { dst_type: INT4 } } }
        override_layer_configs { layer_name: "stem"
          retrain_data_quant_config { ulq_quantize { fixed_min: true } }
          retrain_weight_quant_config { arq_retrain { } } }
        override_layer_configs { layer_name: "body.conv"
          retrain_data_quant_config { ulq_quantize { fixed_min: true } } }""",
    )
    data = {name: layer.retrain_data_config for name, layer in config.layers.items()}
    weights = {name: layer.retrain_weight_config for name, layer in config.layers.items()}
    # A field that a block leaves out has the schema's default, whatever other blocks say.
    assert (data["stem"].dst_type, data["stem"].fixed_min) == ("INT8", True)
    assert (weights["stem"].algo, weights["stem"].dst_type) == ("arq_retrain", "INT8")
    # What an override says nothing of comes from the next one.
    assert (data["body.conv"].dst_type, data["body.conv"].fixed_min) == ("INT8", True)
    assert (weights["body.conv"].algo, weights["body.conv"].dst_type) == ("ulq_retrain", "INT4")
    assert (data["body.depthwise"].dst_type, data["head"].dst_type) == ("INT4", "INT4")
    assert weights["head"].algo == "arq_retrain"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "retrain_data_quant_config or retrain_weight_quant_config switches quantization on"),
        (
            'override_layer_configs { layer_name: "stem" retrain_data_quant_config { } }',
            r"has only overrides \(override_layer_configs\[stem\]\), which do not",
        ),
        (
            "prune_config { filter_pruner { balanced_l2_norm_filter_prune { prune_ratio: 0.5 } } }",
            "switches quantization on, and the file has neither",
        ),
        (
            "retrain_data_quant_config { ulq_quantize { dst_type: INT16 } }",
            "retrain_data_quant_config.ulq_quantize.dst_type is .INT16.; allowed",
        ),
        (
            "retrain_weight_quant_config { arq_retrain { dst_type: INT16 } }",
            "retrain_weight_quant_config.arq_retrain.dst_type is INT16; allowed",
        ),
        (
            "retrain_data_quant_config { ulq_quantize { "
            "clip_max_min { clip_max: 1 clip_min: 2 } } }",
            r"ulq_quantize.clip_max_min.clip_min is 2.0; allowed: a number < 0",
        ),
        (ON + "batch_num: 0", "batch_num is 0"),
        (ON + 'skip_layers: "stom"', "skip_layers: stom: the model has no such layer.*'stem'"),
        (ON + 'quant_skip_types: "Lineer"', "quant_skip_types: .*did you mean 'Linear'"),
        (ON + 'quant_skip_types: "Linear" quant_skip_types: "Conv2d"', "no layer is enabled"),
        (
            ON + 'override_layer_configs { layer_name: "head" '
            "retrain_weight_quant_config { arq_retrain { channel_wise: true } } }",
            "channel_wise is not allowed for head: Linear has one scale",
        ),
        (
            ON + 'override_layer_configs { layer_name: "shared" }',
            f"shared cannot be quantized: {REUSED}",
        ),
    ],
)
def test_what_a_cfg_gets_wrong_is_told(tmp_path, text, told):
    with pytest.raises(ConfigError, match=told):
        from_cfg(tmp_path, text)


def test_channel_wise_for_all_is_for_those_that_can_have_it(tmp_path, caplog):
    text = "retrain_weight_quant_config { arq_retrain { channel_wise: true } }"
    config = from_cfg(tmp_path, text)
    assert config.layers["head"].retrain_weight_config.channel_wise is False
    assert config.layers["stem"].retrain_weight_config.channel_wise is True
    assert "channel_wise is not applied to head: Linear has one scale" in caplog.text


def test_small_layers_and_what_cannot_be_packed_are_told(tmp_path, caplog):
    text = ON + "retrain_weight_quant_config { arq_retrain { dst_type: INT4 } }"
    tell_of_layers(LAYERS, from_cfg(tmp_path, text))
    assert "16 input channels or fewer is not recommended: stem (3), head (8)\n" in caplog.text
    assert "stem: trained with weights of 4 bits, deployed with 8: its 3 input" in caplog.text
    assert "body.depthwise: trained with weights of 4 bits, deployed with 8" in caplog.text
    assert "body.conv: trained" not in caplog.text
