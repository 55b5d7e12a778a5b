"""What the sparsity part of a .cfg means for the layers of a model."""

import logging

import pytest
from config_cases import MODULES, REUSED, conv, linear

from amct_pytorch.config.cfg_file import parse_retrain_cfg
from amct_pytorch.config.prune_cfg import (
    CHANNELS,
    TWO_OF_FOUR,
    ChannelPlan,
    TwoOfFourPlan,
    prune_config_from_cfg,
)
from amct_pytorch.errors import ConfigError
from amct_pytorch.graph.layers import SeenLayer

LAYERS = (
    conv("conv1", cin=3),
    conv("layer1.conv"),
    SeenLayer("up", "ConvTranspose2d", None, 8, 1, (8, 4, 2, 2)),
    SeenLayer("pool", "AvgPool2d", None, 0, 1, ()),
    linear("fc"),
    linear("shared", REUSED),
)
NAMES = (*MODULES, "up", "pool")


def channels(ratio, rest=""):
    return f"filter_pruner {{ balanced_l2_norm_filter_prune {{ prune_ratio: {ratio} {rest} }} }}"


def two_of_four(freq):
    return f"n_out_of_m_pruner {{ l1_selective_prune {{ update_freq: {freq} }} }}"


def read(tmp_path, text, layers=LAYERS):
    path = tmp_path / "prune.cfg"
    path.write_text(text)
    return prune_config_from_cfg(parse_retrain_cfg(path), layers, NAMES, str(path))


def refused(tmp_path, text):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    return str(caught.value)


def test_a_name_beats_a_type_beats_the_global_block(tmp_path):
    config = read(
        tmp_path,
        f"""prune_config {{ {channels(0.3)} }}
        override_layer_types {{ layer_type: "Conv2d"
          prune_config {{ {channels(0.5, "ascend_optimized: false")} }} }}
        override_layer_configs {{ layer_name: "conv1" prune_config {{ {channels(0.7)} }} }}
        """,
    )
    assert config.kind == CHANNELS
    assert config.plans == {
        "conv1": ChannelPlan(0.7, True),
        "layer1.conv": ChannelPlan(0.5, False),
        "fc": ChannelPlan(0.3, True),
    }
    assert config.left == {"shared": REUSED}


def test_two_of_four_is_for_transposed_convolutions_too(tmp_path):
    config = read(
        tmp_path,
        f"""prune_config {{ {two_of_four(0)} }}
        override_layer_types {{ layer_type: "ConvTranspose2d" prune_config {{ {two_of_four(3)} }} }}
        """,
    )
    assert config.kind == TWO_OF_FOUR
    assert config.plans["up"] == TwoOfFourPlan(3)
    assert config.plans["conv1"] == TwoOfFourPlan(0)
    assert "pool" not in config.plans and "pool" not in config.left


def test_defaults_of_the_blocks(tmp_path):
    config = read(tmp_path, "prune_config { n_out_of_m_pruner { l1_selective_prune { } } }")
    assert set(config.plans.values()) == {TwoOfFourPlan(0)}


def test_all_skip_lists_count(tmp_path):
    config = read(
        tmp_path,
        f"""prune_config {{ {channels(0.5)} }}
        skip_layers: "conv1" skip_layers: "pool"
        regular_prune_skip_layers: "layer1.conv"
        regular_prune_skip_types: "Linear"
        override_layer_configs {{ layer_name: "conv1" prune_config {{ {channels(0.7)} }} }}
        """,
    )
    assert config.plans == {}
    skipped = "the config skips it"
    assert config.left == dict.fromkeys(("conv1", "layer1.conv", "fc", "shared"), skipped)


def test_quantization_alone_asks_for_no_sparsity(tmp_path):
    assert read(tmp_path, "retrain_weight_quant_config { arq_retrain { } }") is None
    assert read(tmp_path, "") is None


def test_overrides_beside_quantization_are_told_to_have_no_effect(tmp_path, caplog):
    text = f"""retrain_data_quant_config {{ ulq_quantize {{ }} }}
    override_layer_configs {{ layer_name: "fc" prune_config {{ {channels(0.5)} }} }}"""
    with caplog.at_level(logging.WARNING, "amct_pytorch"):
        assert read(tmp_path, text) is None
    assert "override_layer_configs[fc].prune_config has no effect" in caplog.text


def test_only_overrides(tmp_path):
    text = f'override_layer_configs {{ layer_name: "fc" prune_config {{ {channels(0.5)} }} }}'
    assert "overrides alone do not switch pruning on" in refused(tmp_path, text)


def test_both_kinds_in_one_file(tmp_path):
    text = f"""prune_config {{ {channels(0.5)} }}
    override_layer_configs {{ layer_name: "fc" prune_config {{ {two_of_four(0)} }} }}"""
    message = refused(tmp_path, text)
    assert "override_layer_configs[fc].prune_config asks for n_out_of_m_pruner" in message
    assert "allowed: one kind in a file" in message


def test_both_kinds_in_one_block_have_line_and_column(tmp_path):
    text = f"prune_config {{ {channels(0.5)} {two_of_four(0)} }}"
    assert "line 1" in refused(tmp_path, text)


@pytest.mark.parametrize("ratio", ["0", "1", "-0.5", "1.5", "nan", "inf"])
def test_ratio_out_of_range(tmp_path, ratio):
    message = refused(tmp_path, f"prune_config {{ {channels(ratio)} }}")
    assert "balanced_l2_norm_filter_prune.prune_ratio is" in message
    assert "allowed: a number in (0, 1)" in message


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ("", "prune_config names no kind of sparsity; allowed: filter_pruner or n_out_of_m_pruner"),
        ("filter_pruner { }", "names no algorithm; allowed: balanced_l2_norm_filter_prune"),
        ("n_out_of_m_pruner { }", "names no algorithm; allowed: l1_selective_prune"),
        ("filter_pruner { balanced_l2_norm_filter_prune { } }", "prune_ratio"),
    ],
)
def test_blocks_that_say_too_little(tmp_path, block, said):
    assert said in refused(tmp_path, f"prune_config {{ {block} }}")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('skip_layers: "conv2"', "skip_layers: conv2: the model has no such layer (did you mean"),
        (
            'regular_prune_skip_layers: "layer1.con"',
            "regular_prune_skip_layers: layer1.con: the model has no such layer (did you mean",
        ),
        ('regular_prune_skip_types: "Linea"', "'Linear'?"),
        ('skip_layer_types: "Conv2"', "'Conv2d'?"),
    ],
)
def test_unknown_names_come_with_the_nearest(tmp_path, line, said):
    assert said in refused(tmp_path, f"prune_config {{ {channels(0.5)} }} {line}")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("layer1.conf", "the model has no such layer (did you mean 'layer1.conv'?)"),
        ("up", "it is not of a type that is pruned (Conv2d, Linear)"),
        ("bn1", "it is not of a type that is pruned (Conv2d, Linear)"),
        ("shared", f"shared cannot be pruned: {REUSED}"),
    ],
)
def test_overrides_of_layers_that_cannot_be_pruned(tmp_path, name, said):
    text = f"""prune_config {{ {channels(0.5)} }}
    override_layer_configs {{ layer_name: "{name}" prune_config {{ {channels(0.5)} }} }}"""
    assert said in refused(tmp_path, text)


def test_an_override_by_a_type_that_is_not_pruned(tmp_path):
    text = f"""prune_config {{ {channels(0.5)} }}
    override_layer_types {{ layer_type: "ConvTranspose2d" prune_config {{ {channels(0.5)} }} }}"""
    message = refused(tmp_path, text)
    assert "no type of layer that is pruned; allowed: Conv2d, Linear" in message


def test_overrides_for_quantization_only_do_not_change_the_plan(tmp_path):
    text = f"""prune_config {{ {channels(0.5)} }}
    override_layer_configs {{ layer_name: "conv1"
      retrain_weight_quant_config {{ arq_retrain {{ }} }} }}"""
    assert read(tmp_path, text).plans["conv1"] == ChannelPlan(0.5)


def test_names_of_overrides_for_quantization_are_checked_too(tmp_path):
    text = f"""prune_config {{ {channels(0.5)} }}
    override_layer_configs {{ layer_name: "conv9"
      retrain_weight_quant_config {{ arq_retrain {{ }} }} }}"""
    assert "override_layer_configs[conv9]: conv9: the model has no such layer" in refused(
        tmp_path, text
    )
