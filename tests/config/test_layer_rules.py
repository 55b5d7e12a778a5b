"""What a layer gets of what a config asks for it."""

import pytest
from config_cases import LAYERS, from_cfg

from amct_pytorch.config.layer_rules import with_packable_weights


def test_four_bits_become_eight_where_two_do_not_fit_a_byte(tmp_path, caplog):
    config = from_cfg(
        tmp_path, 'common_config { arq_quantize { quant_bits: 4 } } skip_layers: "conv1"'
    )
    caplog.clear()
    packable, notes = with_packable_weights(config, LAYERS)
    bits = {name: layer.weight_quant_params.num_bits for name, layer in packable.layers.items()}
    # A skipped layer is left as it stands; nothing is said of it.
    assert bits == {"conv1": 4, "layer1.conv": 4, "layer1.depthwise": 8, "fc": 4}
    assert notes == {"layer1.depthwise": "weights get 8 bits, not 4: it has 8 groups"}
    assert [record.getMessage() for record in caplog.records] == [
        "layer1.depthwise: weights get 8 bits, not 4: it has 8 groups"
    ]


def test_an_odd_number_of_input_channels_is_named(tmp_path):
    config = from_cfg(tmp_path, "common_config { arq_quantize { quant_bits: 4 } }")
    _, notes = with_packable_weights(config, LAYERS)
    assert notes["conv1"].endswith("its 3 input channels are an odd number")


@pytest.mark.parametrize("bits", [6, 7, 8])
def test_other_bits_stay(tmp_path, bits):
    config = from_cfg(tmp_path, f"common_config {{ arq_quantize {{ quant_bits: {bits} }} }}")
    assert with_packable_weights(config, LAYERS) == (config, {})
