"""What a calibration .cfg means for the layers of a model."""

import json

import pytest
from config_cases import LAYERS, MODULES, REUSED, conv, from_cfg

from amct_pytorch.config.calibration_cfg import calibration_config_from_cfg
from amct_pytorch.config.calibration_json import dump_calibration_json
from amct_pytorch.config.cfg_file import parse_calibration_cfg
from amct_pytorch.config.defaults import default_calibration_config
from amct_pytorch.config.models import AdaParams, ArqParams, CalibrationConfig, HfmgParams
from amct_pytorch.errors import ConfigError, FileMissingError
from amct_pytorch.proto import AMCTConfig


def test_an_empty_file_is_the_default_config(tmp_path):
    assert from_cfg(tmp_path, "# nothing\n") == default_calibration_config(LAYERS)


def test_globals(tmp_path):
    config = from_cfg(
        tmp_path,
        """
        batch_num : 4  # four
        activation_offset: false
        do_fusion: false
        skip_fusion_layers: "conv1"
        skip_fusion_layers: "bn1"
        fakequant_precision_mode: FORCE_FP16_QUANT
        """,
    )
    assert config.model_copy(update={"layers": {}}) == CalibrationConfig(
        batch_num=4,
        activation_offset=False,
        do_fusion=False,
        skip_fusion_layers=["conv1", "bn1"],
        fakequant_precision_mode="FORCE_FP16_QUANT",
    )


def test_floats_are_the_decimals_that_were_written(tmp_path):
    config = from_cfg(
        tmp_path,
        """common_config {
          ifmr_quantize {
            search_range_start: 0.7 search_range_end: 1.1 search_step: 0.02
            max_percentile: 0.9999 min_percentile: 0.99999
          }
          ada_quantize { reg_param: 0.03 beta_range_start: 15.3 warm_start: 0.1 }
          dmq_balancer { migration_strength: 0.8 }
        }""",
    )
    layer = json.loads(dump_calibration_json(config))["conv1"]
    assert layer["activation_quant_params"] == {
        "act_algo": "ifmr",
        "num_bits": 8,
        "max_percentile": 0.9999,
        "min_percentile": 0.99999,
        "search_range": [0.7, 1.1],
        "search_step": 0.02,
    }
    assert layer["weight_quant_params"]["beta_range"] == [15.3, 2.0]
    assert layer["weight_quant_params"]["reg_param"] == 0.03
    assert layer["dmq_balancer_param"] == 0.8


def test_the_schema_and_the_models_have_the_same_defaults(tmp_path):
    """A block that sets every field to the schema's default changes nothing."""

    def spelled_out(message):
        lines = []
        for field in message.DESCRIPTOR.fields:
            if field.has_default_value and not field.message_type:
                value = getattr(message, field.name)
                if field.enum_type:
                    value = field.enum_type.values_by_number[value].name
                lines.append(f"{field.name}: {str(value).lower() if value in (0, 1) else value}")
        return " ".join(lines)

    for acts, weights in (("ifmr_quantize", "arq_quantize"), ("hfmg_quantize", "ada_quantize")):
        block = AMCTConfig().common_config
        explicit = " ".join(
            f"{name} {{ {spelled_out(getattr(block, name))} }}"
            for name in (acts, weights, "dmq_balancer")
        )
        implicit = f"{acts} {{}} {weights} {{}} dmq_balancer {{}}"
        text = "batch_num: 1 activation_offset: true do_fusion: true common_config {{ {} }}"
        assert "search_step" in explicit or "num_of_bins" in explicit
        first = from_cfg(tmp_path, text.format(explicit))
        assert first == from_cfg(tmp_path, text.format(implicit))


def test_a_name_beats_a_type_beats_common(tmp_path):
    config = from_cfg(
        tmp_path,
        """
        common_config { hfmg_quantize {} ada_quantize {} dmq_balancer {} }
        override_layer_types { layer_type: "Conv2d" calibration_config {
          hfmg_quantize { num_of_bins: 1024 } } }
        override_layer_configs { layer_name: "conv1" calibration_config {
          ifmr_quantize { search_step: 0.1 } } }
        """,
    )
    one, by_type, common = (config.layers[name] for name in ("conv1", "layer1.conv", "fc"))
    assert common.activation_quant_params == HfmgParams(num_bits=8)
    assert common.weight_quant_params == AdaParams(num_bits=8, channel_wise=False)
    assert common.dmq_balancer_param == 0.5
    # What an override leaves out is the schema's default, not what common_config says.
    assert by_type.activation_quant_params == HfmgParams(num_bits=8, num_of_bins=1024)
    assert by_type.weight_quant_params == ArqParams(num_bits=8, channel_wise=True)
    assert by_type.dmq_balancer_param is None
    assert one.activation_quant_params.search_step == 0.1


def test_skips_are_the_union_of_names_and_types_and_stay_in_the_file(tmp_path):
    text = 'skip_layers: "conv1" skip_layers: "conv1" skip_layer_types: "Linear"'
    config = from_cfg(tmp_path, text)
    assert list(config.enabled_layers()) == ["layer1.conv", "layer1.depthwise"]
    assert list(config.layers) == ["conv1", "layer1.conv", "layer1.depthwise", "fc"]


def test_an_override_does_not_undo_a_skip(tmp_path):
    text = """skip_layers: "conv1" override_layer_configs { layer_name: "conv1"
              calibration_config { arq_quantize { quant_bits: 7 } } }"""
    layer = from_cfg(tmp_path, text).layers["conv1"]
    assert not layer.quant_enable
    assert layer.weight_quant_params.num_bits == 7


def test_asymmetric_is_written_only_where_it_was_asked_for(tmp_path):
    text = """activation_offset: false override_layer_configs { layer_name: "conv1"
              calibration_config { ifmr_quantize { asymmetric: true } } }"""
    config = from_cfg(tmp_path, text)
    assert dump_calibration_json(config).count("asymmetric") == 1
    assert [config.asymmetric(name) for name in ("conv1", "fc")] == [True, False]


@pytest.mark.parametrize(
    "block",
    [
        "common_config {{ {} }}",
        'override_layer_types {{ layer_type: "Linear" calibration_config {{ {} }} }}',
    ],
)
def test_what_linear_cannot_have_is_logged_once_and_given_to_the_others(tmp_path, caplog, block):
    wanted = "arq_quantize { channel_wise: true quant_bits: 6 }"
    config = from_cfg(tmp_path, block.format(wanted))
    linear = config.layers["fc"].weight_quant_params
    assert (linear.channel_wise, linear.num_bits) == (False, 8)
    if block.startswith("common"):
        assert config.layers["conv1"].weight_quant_params.num_bits == 6
    messages = [record.getMessage() for record in caplog.records]
    assert sum("channel_wise is not applied to fc" in text for text in messages) == 1
    assert sum("quant_bits is not applied to fc" in text for text in messages) == 1


def test_channel_wise_false_for_convolutions(tmp_path):
    config = from_cfg(tmp_path, "common_config { arq_quantize { channel_wise: false } }")
    assert not config.layers["conv1"].weight_quant_params.channel_wise


def test_four_bits_are_kept_and_a_fall_back_to_come_is_told(tmp_path, caplog):
    config = from_cfg(tmp_path, "common_config { arq_quantize { quant_bits: 4 } }")
    bits = {name: layer.weight_quant_params.num_bits for name, layer in config.layers.items()}
    assert bits == {"conv1": 4, "layer1.conv": 4, "layer1.depthwise": 4, "fc": 4}
    assert "conv1: weights will get 8 bits, not 4" in caplog.text
    assert "layer1.depthwise: weights will get 8 bits, not 4" in caplog.text


def test_a_type_that_the_model_does_not_have_is_logged(tmp_path, caplog):
    from_cfg(tmp_path, 'skip_layer_types: "Linear"', layers=[conv("conv1")])
    assert "skip_layer_types: the model has no layer of type Linear" in caplog.text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "batch_num: 1\nbatchnum: 2",
            "line 2, column 1: unknown field 'batchnum' (did you mean 'b",
        ),
        ("common_config {\n  arq_quantize { chanel_wise: true }\n}", "line 2, column 18"),
        ("common_config {\n  arq_quantize { chanel_wise: true }\n}", "did you mean 'channel_wise'"),
        ("common_config { zzz {} }", "allowed are arq_quantize, ada_quantize, ifmr_quantize"),
        ("fakequant_precision_mode: FP16", "unknown value FP16; allowed are FORCE_FP16_QUANT"),
        ("common_config { ifmr_quantize { dst_type: INT4 } }", "allowed are INT8, INT16"),
        ("batch_num: -1", "line 1, column 12"),
        ("batch_num: 1.5", "line 1, column 12"),
        ("batch_num: 1 batch_num: 2", 'should not have multiple "batch_num"'),
        ("common_config {} common_config {}", "common_config"),
        ("common_config { arq_quantize {} ada_quantize {} }", "specified along with"),
        ("common_config {", 'Expected "}"'),
        ('skip_layers: "conv1', "quote"),
        ("skip_layers: '\\377'", "quant.cfg"),
        ('override_layer_configs { layer_name: "conv1" }', "[0].calibration_config"),
        ("override_layer_types { calibration_config {} }", "required, but missing: override"),
    ],
)
def test_text_that_does_not_parse(tmp_path, text, words):
    with pytest.raises(ConfigError) as caught:
        from_cfg(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "quant.cfg"))
    assert words in str(caught.value)


BY_NAME = 'override_layer_configs {{ layer_name: "{}" calibration_config {{ {} }} }}'
BY_TYPE = 'override_layer_types {{ layer_type: "{}" calibration_config {{ {} }} }}'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch_num: 0", "batch_num is 0; allowed: an integer >= 1"),
        ('skip_layers: "cnv1"', "skip_layers: cnv1: the model has no such layer (did you mean 'c"),
        ('skip_layers: "bn1"', "bn1: the model has it, but it is not of a type"),
        ('skip_layer_types: "conv2d"', "AvgPool2d (did you mean 'Conv2d'?)"),
        ('skip_fusion_layers: "conv"', "skip_fusion_layers: conv: the model has no such module"),
        (BY_TYPE.format("Conv1d", ""), 'override_layer_types[Conv1d]: "Conv1d" is no type'),
        (BY_NAME.format("fd", ""), "override_layer_configs[fd]: fd: the model has no such layer"),
        (BY_NAME.format("shared", ""), f"shared cannot be quantized: {REUSED}"),
        (BY_NAME.format("fc", "") * 2, "override_layer_configs[fc] is there more than once"),
        (BY_TYPE.format("Linear", "") * 2, "override_layer_types[Linear] is there more than once"),
        (
            BY_NAME.format("fc", "arq_quantize { channel_wise: true }"),
            "[fc].calibration_config: channel_wise is not allowed for fc: Linear has one scale",
        ),
        (
            BY_NAME.format("fc", "arq_quantize { quant_bits: 6 }"),
            "quant_bits is not allowed for fc: 6 and 7 bits are for Conv2d only",
        ),
        (
            "common_config { arq_quantize { quant_bits: 5 } }",
            "common_config.arq_quantize.quant_bits is 5; allowed: 8, 7, 6 or 4",
        ),
        (
            "common_config { ifmr_quantize { dst_type: INT16 } }",
            "common_config.ifmr_quantize.dst_type is INT16; allowed: INT8 "
            "(INT16 activations are not supported in this version)",
        ),
        (
            "common_config { hfmg_quantize { dst_type: INT16 } }",
            "common_config.hfmg_quantize.dst_type is INT16; allowed: INT8",
        ),
        (
            BY_TYPE.format("Conv2d", "ifmr_quantize { search_range_start: -0.5 }"),
            "calibration_config.ifmr_quantize.search_range_start/end is [-0.5, 1.3]",
        ),
        (
            "common_config { ifmr_quantize { search_range_end: inf } }",
            "ifmr_quantize.search_range_end is Infinity",
        ),
        ("common_config { ifmr_quantize { search_step: nan } }", "search_step is NaN"),
        ("common_config { ifmr_quantize { search_step: 0.7 } }", "search_step is 0.7"),
        ("common_config { hfmg_quantize { num_of_bins: 9 } }", "hfmg_quantize.num_of_bins is 9"),
        (
            "common_config { ada_quantize { beta_range_end: 21 } }",
            "ada_quantize.beta_range_start/end is [20.0, 21.0]",
        ),
        (
            "common_config { dmq_balancer { migration_strength: 0.9 } }",
            "common_config.dmq_balancer.migration_strength is 0.9; allowed: a number in [0.2, 0.8]",
        ),
    ],
)
def test_what_does_not_fit(tmp_path, text, words):
    with pytest.raises(ConfigError) as caught:
        from_cfg(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'quant.cfg'}: ")
    assert words in str(caught.value)


def test_all_problems_are_told_at_once(tmp_path):
    text = 'batch_num: 0 skip_layers: "x" ' + BY_NAME.format("fd", "arq_quantize {quant_bits: 3}")
    with pytest.raises(ConfigError, match="4 problems"):
        from_cfg(tmp_path, text)


def test_a_message_made_without_a_file():
    config = calibration_config_from_cfg(AMCTConfig(batch_num=2), LAYERS, MODULES, "preset")
    assert config.batch_num == 2


def test_a_missing_file(tmp_path):
    with pytest.raises(FileMissingError, match=r"config_defination.*none\.cfg"):
        parse_calibration_cfg(tmp_path / "none.cfg")
