"""Features that are checked in full but not there yet."""

import pytest
from config_cases import LAYERS, from_cfg, linear

from amct_pytorch.config.availability import check_available, unavailable_features
from amct_pytorch.config.defaults import default_calibration_config
from amct_pytorch.errors import ConfigError


def test_the_default_config_can_be_run():
    config = default_calibration_config(LAYERS)
    assert unavailable_features(config) == []
    check_available(config, "quant.json")


@pytest.mark.parametrize(
    ("block", "feature"),
    [
        ("ada_quantize {}", "ada_quantize"),
        ("dmq_balancer {}", "dmq_balancer"),
    ],
)
def test_features_to_come(tmp_path, block, feature):
    name = (
        f'override_layer_configs {{ layer_name: "layer1.conv" calibration_config {{ {block} }} }}'
    )
    config = from_cfg(tmp_path, name)
    with pytest.raises(ConfigError) as caught:
        check_available(config, "quant.json")
    text = str(caught.value)
    for part in ("quant.json", feature, "is not available in this version", "layer1.conv"):
        assert part in text
    # Nobody is kept from working by what a skipped layer asks for.
    assert unavailable_features(from_cfg(tmp_path, f'{name} skip_layers: "layer1.conv"')) == []


def test_long_lists_of_layers_are_shortened(tmp_path):
    layers = [linear(f"fc{i}") for i in range(5)]
    [text] = unavailable_features(from_cfg(tmp_path, "common_config{ada_quantize{}}", layers))
    assert "fc0, fc1, fc2 and 2 more layers" in text
