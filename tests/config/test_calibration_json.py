"""What a calibration JSON file may say, and how it is written."""

import json
from typing import ClassVar

import pytest
from config_cases import LAYERS, conv, linear, load

from amct_pytorch.config.calibration_json import dump_calibration_json
from amct_pytorch.config.defaults import default_calibration_config
from amct_pytorch.config.models import (
    AdaParams,
    ArqParams,
    CalibrationConfig,
    HfmgParams,
    IfmrParams,
    LayerConfig,
)


def layer_config(**changes) -> LayerConfig:
    base = {
        "activation_quant_params": {"num_bits": 8},
        "weight_quant_params": {"num_bits": 8, "channel_wise": True},
    }
    return LayerConfig.model_validate(base | changes)


class TestDump:
    def test_the_default_file(self):
        config = default_calibration_config([linear("fc"), conv("conv1")])
        assert dump_calibration_json(config) == DEFAULT_FILE

    def test_globals_in_the_documented_order(self):
        config = CalibrationConfig(
            bias_correction=False,
            skip_fusion_layers=["conv1"],
            fakequant_precision_mode="FORCE_FP16_QUANT",
        )
        assert list(json.loads(dump_calibration_json(config)).items()) == [
            ("version", 1),
            ("batch_num", 1),
            ("activation_offset", True),
            ("do_fusion", True),
            ("fakequant_precision_mode", "FORCE_FP16_QUANT"),
            ("skip_fusion_layers", ["conv1"]),
            ("bias_correction", False),
        ]

    def test_layers_alphabetically(self):
        layers = {name: layer_config() for name in ("b", "a.10", "a.2", "B")}
        document = json.loads(dump_calibration_json(CalibrationConfig(layers=layers)))
        assert list(document)[-4:] == ["B", "a.10", "a.2", "b"]

    def test_keys_of_a_layer_in_the_documented_order(self):
        layer = layer_config(
            dmq_balancer_param=0.5,
            activation_quant_params={"num_bits": 8, "act_algo": "hfmg", "asymmetric": False},
            weight_quant_params={"channel_wise": True, "num_bits": 8, "wts_algo": "ada_quantize"},
        )
        document = json.loads(dump_calibration_json(CalibrationConfig(layers={"conv1": layer})))
        assert json.dumps(document["conv1"]) == json.dumps(
            {
                "quant_enable": True,
                "dmq_balancer_param": 0.5,
                "activation_quant_params": {
                    "act_algo": "hfmg",
                    "num_bits": 8,
                    "asymmetric": False,
                    "num_of_bins": 4096,
                },
                "weight_quant_params": {
                    "wts_algo": "ada_quantize",
                    "num_iteration": 10000,
                    "reg_param": 0.01,
                    "beta_range": [20.0, 2.0],
                    "warm_start": 0.2,
                    "num_bits": 8,
                    "channel_wise": True,
                },
            }
        )

    def test_names_beyond_ascii_stay_readable(self):
        config = CalibrationConfig(layers={"卷积": layer_config()})
        assert '"卷积"' in dump_calibration_json(config)


class TestLoad:
    def test_an_empty_object_quantizes_nothing(self, tmp_path):
        assert load(tmp_path, {}) == CalibrationConfig()

    def test_globals(self, tmp_path):
        config = load(
            tmp_path,
            {
                "version": 1,
                "batch_num": 7,
                "activation_offset": False,
                "do_fusion": False,
                "fakequant_precision_mode": "FORCE_FP16_QUANT",
                "skip_fusion_layers": ["conv1", "bn1"],
                "bias_correction": False,
            },
        )
        assert config == CalibrationConfig(
            batch_num=7,
            activation_offset=False,
            do_fusion=False,
            fakequant_precision_mode="FORCE_FP16_QUANT",
            skip_fusion_layers=["conv1", "bn1"],
            bias_correction=False,
        )

    def test_a_layer_without_params_gets_those_of_its_type(self, tmp_path):
        config = load(tmp_path, {"conv1": {}, "fc": {"quant_enable": True}})
        assert config.layers["conv1"].activation_quant_params == IfmrParams(num_bits=8)
        assert config.layers["conv1"].weight_quant_params == ArqParams(
            num_bits=8, channel_wise=True
        )
        assert config.layers["fc"].weight_quant_params.channel_wise is False
        assert config.layers["fc"].quant_enable

    def test_blocks_need_num_bits_only(self, tmp_path):
        config = load(
            tmp_path,
            {
                "conv1": {
                    "activation_quant_params": {"act_algo": "hfmg", "num_bits": 8},
                    "weight_quant_params": {"wts_algo": "ada_quantize", "num_bits": 4},
                },
                "layer1.conv": {
                    "activation_quant_params": {"num_bits": 8, "search_step": 0.1},
                    "weight_quant_params": {"num_bits": 6},
                },
            },
        )
        first, second = config.layers.values()
        assert first.activation_quant_params == HfmgParams(num_bits=8)
        assert second.activation_quant_params == IfmrParams(num_bits=8, search_step=0.1)
        assert second.weight_quant_params == ArqParams(num_bits=6, channel_wise=True)
        assert isinstance(first.weight_quant_params, AdaParams)

    def test_which_layers_are_quantized(self, tmp_path):
        config = load(tmp_path, {"conv1": {"quant_enable": False}, "fc": {}})
        assert list(config.layers) == ["conv1", "fc"]
        assert list(config.enabled_layers()) == ["fc"]

    def test_asymmetric_beats_activation_offset(self, tmp_path):
        document = {
            "activation_offset": False,
            "conv1": {"activation_quant_params": {"num_bits": 8, "asymmetric": True}},
            "fc": {},
        }
        config = load(tmp_path, document)
        assert config.asymmetric("conv1") is True
        assert config.asymmetric("fc") is False
        assert load(tmp_path, {**document, "activation_offset": True}).asymmetric("fc") is True

    def test_a_layer_that_cannot_be_quantized_may_be_there_switched_off(self, tmp_path):
        config = load(tmp_path, {"shared": {"quant_enable": False}})
        assert config.enabled_layers() == {}

    def test_a_step_as_wide_as_the_range_in_decimals(self, tmp_path):
        params = {"num_bits": 8, "search_range": [0.9, 1.0], "search_step": 0.1}
        config = load(tmp_path, {"conv1": {"activation_quant_params": params}})
        assert config.layers["conv1"].activation_quant_params.search_step == 0.1

    def test_integers_are_good_numbers(self, tmp_path):
        params = {"num_bits": 8, "search_range": [1, 3], "search_step": 1, "max_percentile": 1}
        config = load(tmp_path, {"conv1": {"activation_quant_params": params}})
        assert config.layers["conv1"].activation_quant_params.search_range == (1.0, 3.0)

    def test_a_config_cannot_be_changed_by_accident(self, tmp_path):
        config = load(tmp_path, {"conv1": {}})
        with pytest.raises(ValueError, match="frozen"):
            config.layers["conv1"].quant_enable = False


class TestDefaults:
    names: ClassVar = [layer.name for layer in LAYERS if layer.quantizable]

    def test_layers_that_cannot_be_quantized_are_left_out_and_named(self, caplog):
        config = default_calibration_config(LAYERS, batch_num=3, activation_offset=False)
        assert list(config.layers) == self.names
        assert config.batch_num == 3
        assert config.activation_offset is False
        assert "shared is not quantized: its weight is used by two calls" in caplog.text

    def test_skipped_layers_stay_switched_off(self):
        config = default_calibration_config(LAYERS, skip_layers=["fc", "shared"])
        assert [name for name in config.layers if name not in config.enabled_layers()] == ["fc"]

    def test_activation_offset_is_not_repeated_per_layer(self):
        config = default_calibration_config(LAYERS, activation_offset=False)
        assert "asymmetric" not in dump_calibration_json(config)

    def test_a_module_named_like_a_key_of_the_file_is_left_out(self, caplog):
        config = default_calibration_config([linear("version"), linear("fc")])
        assert list(config.layers) == ["fc"]
        assert "version is not quantized" in caplog.text


DEFAULT_FILE = """\
{
    "version": 1,
    "batch_num": 1,
    "activation_offset": true,
    "do_fusion": true,
    "skip_fusion_layers": [],
    "conv1": {
        "quant_enable": true,
        "activation_quant_params": {
            "act_algo": "ifmr",
            "num_bits": 8,
            "max_percentile": 0.999999,
            "min_percentile": 0.999999,
            "search_range": [
                0.7,
                1.3
            ],
            "search_step": 0.01
        },
        "weight_quant_params": {
            "wts_algo": "arq_quantize",
            "num_bits": 8,
            "channel_wise": true
        }
    },
    "fc": {
        "quant_enable": true,
        "activation_quant_params": {
            "act_algo": "ifmr",
            "num_bits": 8,
            "max_percentile": 0.999999,
            "min_percentile": 0.999999,
            "search_range": [
                0.7,
                1.3
            ],
            "search_step": 0.01
        },
        "weight_quant_params": {
            "wts_algo": "arq_quantize",
            "num_bits": 8,
            "channel_wise": false
        }
    }
}
"""
