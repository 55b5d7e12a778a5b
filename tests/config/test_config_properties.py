"""Configs survive their file, and broken files are told apart from broken programs."""

import tempfile
from pathlib import Path

from config_cases import (
    LAYERS,
    MODULES,
    RETRAIN_LAYERS,
    from_cfg,
    load,
    load_retrain,
    retrain_from_cfg,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amct_pytorch.config.calibration_json import dump_calibration_json
from amct_pytorch.config.defaults import default_calibration_config
from amct_pytorch.config.layered_json import dump_layered
from amct_pytorch.config.models import (
    AdaParams,
    ArqParams,
    CalibrationConfig,
    HfmgParams,
    IfmrParams,
    LayerConfig,
)
from amct_pytorch.config.retrain_json import default_retrain_config
from amct_pytorch.errors import AmctError

few = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
fractions = st.floats(0, 1, exclude_min=True, exclude_max=True)
percentiles = st.floats(0.5, 1, exclude_min=True)
offsets = st.none() | st.booleans()


@st.composite
def ifmr(draw):
    start = draw(st.floats(1e-3, 10))
    end = draw(st.floats(start + 1e-3, 20))
    given_offset = draw(offsets)
    return IfmrParams(
        num_bits=8,
        max_percentile=draw(percentiles),
        min_percentile=draw(percentiles),
        search_range=(start, end),
        search_step=draw(st.floats(0, end - start, exclude_min=True)),
        **({} if given_offset is None else {"asymmetric": given_offset}),
    )


hfmg = st.builds(HfmgParams, num_bits=st.just(8), num_of_bins=st.sampled_from([1024, 8192]))
betas = st.tuples(st.floats(3, 100), st.floats(1e-3, 2.9))


def weights(channel_wise, bits):
    common = {"num_bits": st.sampled_from(bits), "channel_wise": channel_wise}
    ada = st.builds(
        AdaParams,
        num_iteration=st.integers(0, 10**6),
        reg_param=fractions,
        beta_range=betas,
        warm_start=fractions,
        **common,
    )
    return st.builds(ArqParams, **common) | ada


def layer_configs(weight_params):
    plain = {
        "quant_enable": st.booleans(),
        "activation_quant_params": ifmr() | hfmg,
        "weight_quant_params": weight_params,
    }
    return st.builds(LayerConfig, **plain) | st.builds(
        LayerConfig, dmq_balancer_param=st.floats(0.2, 0.8), **plain
    )


conv_layers = st.fixed_dictionaries(
    {}, optional={"conv1": layer_configs(weights(st.booleans(), [6, 7, 8]))}
)
fc_layers = st.fixed_dictionaries(
    {}, optional={"fc": layer_configs(weights(st.just(False), [4, 8]))}
)
global_keys = {
    "batch_num": st.integers(1, 2**32),
    "activation_offset": st.booleans(),
    "do_fusion": st.booleans(),
    "skip_fusion_layers": st.lists(st.sampled_from([m for m in MODULES if m])),
    "bias_correction": st.booleans(),
    "layers": st.builds(lambda one, two: {**one, **two}, conv_layers, fc_layers),
}
configs = st.builds(CalibrationConfig, **global_keys) | st.builds(
    CalibrationConfig, fakequant_precision_mode=st.just("FORCE_FP16_QUANT"), **global_keys
)


@few
@given(config=configs)
def test_a_config_survives_its_file(config, tmp_path):
    text = dump_calibration_json(config)
    again = load(tmp_path, text)
    assert again == config
    assert dump_calibration_json(again) == text


def only_told(call, *arguments):
    """Whether the call worked; errors made for the user are fine, all others are not."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            call(Path(folder), *arguments)
        except AmctError as error:
            assert str(error)
            assert len(str(error)) < 5000
            return False
    return True


JSON = dump_calibration_json(default_calibration_config(LAYERS))
CFG = """\
batch_num: 2  # two
skip_layers: "fc"
fakequant_precision_mode: FORCE_FP16_QUANT
common_config {
  arq_quantize { channel_wise: true quant_bits: 7 }
  ifmr_quantize { search_range_start: 0.8 search_step: .05 asymmetric: false dst_type: INT8 }
  dmq_balancer { migration_strength: 0.3 }
}
override_layer_types { layer_type: 'Linear' calibration_config { hfmg_quantize { } } }
override_layer_configs { layer_name: "conv1" calibration_config { ada_quantize { } } }
skip_fusion_layers: "bn1"
"""
RETRAIN_JSON = dump_layered(default_retrain_config(RETRAIN_LAYERS))
RETRAIN_CFG = """\
batch_num: 2
retrain_data_quant_config { ulq_quantize { clip_max_min { clip_max: 3 clip_min: -0.5 } } }
override_layer_types { layer_type: 'Linear' retrain_weight_quant_config { ulq_retrain { } } }
override_layer_configs { layer_name: "stem" retrain_weight_quant_config {
  arq_retrain { dst_type: INT4 channel_wise: true } } }
quant_skip_layers: "body.conv" skip_layer_types: "ConvTranspose2d"
prune_config { n_out_of_m_pruner { l1_selective_prune { n_out_of_m_type: M4N2 } } }
"""
SPLICES = st.sampled_from(
    [*"{}[]\":,<>\\\n\0#'", "null", "true", "-1", "1e99", "NaN", "INT16", "16", "é", "\ufeff", "0"]
) | st.text(max_size=3)


@st.composite
def mutations(draw, text):
    """The text with a few pieces cut out, doubled, or replaced."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        stop = min(len(text), start + draw(st.integers(0, 30)))
        middle = draw(st.just("") | st.just(text[start:stop] * 2) | SPLICES)
        text = text[:start] + middle + text[stop:]
    return text


def test_the_texts_to_mutate_are_good():
    assert only_told(load, JSON)
    assert only_told(from_cfg, CFG)
    assert only_told(load_retrain, RETRAIN_JSON)
    assert only_told(retrain_from_cfg, RETRAIN_CFG)


@few
@given(text=mutations(JSON))
def test_mutated_json_gives_user_errors_only(text):
    only_told(load, text)


@few
@given(text=mutations(CFG))
def test_mutated_cfg_gives_user_errors_only(text):
    only_told(from_cfg, text)


@few
@given(text=mutations(RETRAIN_JSON))
def test_mutated_retrain_json_gives_user_errors_only(text):
    only_told(load_retrain, text)


@few
@given(text=mutations(RETRAIN_CFG))
def test_mutated_retrain_cfg_gives_user_errors_only(text):
    only_told(retrain_from_cfg, text)


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["ifmr", "x", "hfmg"])
)
KEYS = [
    *CalibrationConfig.model_fields,
    *LayerConfig.model_fields,
    *IfmrParams.model_fields,
    *AdaParams.model_fields,
    *MODULES,
]
documents = st.dictionaries(
    st.sampled_from(KEYS),
    st.recursive(
        scalars,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
        ),
        max_leaves=12,
    ),
    max_size=5,
)


@few
@given(document=documents)
def test_any_values_under_known_keys_give_user_errors_only(document):
    only_told(load, document)
