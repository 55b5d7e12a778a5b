"""KV-cache calibration from the config to the record."""

import json
import logging
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import amct_pytorch as amct
from amct_pytorch.errors import (
    AmctError,
    ArgumentTypeError,
    ArgumentValueError,
    CalibrationError,
    ConfigError,
    FileAccessError,
    RecordError,
)
from amct_pytorch.formats import INT8
from amct_pytorch.nn.module.quantization import QuantCalibrationOp
from amct_pytorch.record.kv_cache import KvFactors, add_kv_factors, read_kv_factors

NAMES = ["layers.0.k_proj", "layers.0.v_proj", "layers.1.k_proj", "layers.1.v_proj"]


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(16, 16),
            nn.Linear(16, 8),
            nn.Linear(16, 8),
        )
        with torch.no_grad():
            self.k_proj.weight[3] *= 30  # an outlier channel

    def forward(self, x):
        k, v = self.k_proj(x).repeat(1, 1, 2), self.v_proj(x).repeat(1, 1, 2)
        return x + nn.functional.scaled_dot_product_attention(self.q_proj(x), k, v)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.norm = nn.LayerNorm(16)

    def forward(self, x, attention_mask=None):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


@pytest.fixture
def model():
    return Decoder().eval()


def batches(number, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    # Sequences of different length, down to one token.
    return [
        torch.randn(2, 7 * (i % 3) + 1, 16, generator=generator).to(dtype) for i in range(number)
    ]


def write_config(folder, model, *, replace=False, **changes):
    path = folder / "kv.json"
    amct.create_quant_cali_config(path, model, {"kv_cache_quant_layers": ["*.k_proj", "*.v_proj"]})
    document = json.loads(path.read_text())
    document["batch_num"] = 6
    for key in list(document):
        if key in NAMES:
            known = {} if replace else document[key]["kv_data_quant_config"]
            document[key]["kv_data_quant_config"] = known | changes
    path.write_text(json.dumps(document))
    return path


def outputs_of(model, data, name):
    found = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, __, y: found.append(y))
    with torch.no_grad():
        for x in data:
            model(x)
    handle.remove()
    return torch.cat([y.flatten(0, 1) for y in found])


@pytest.mark.parametrize("key", ["kv_cache_quant_layers", "kv_cache_quant"])
def test_config_file_is_as_documented(tmp_path, model, key):
    amct.create_quant_cali_config(tmp_path / "kv.json", model, {key: ["layers.1.v_proj"]})
    assert (tmp_path / "kv.json").read_text() == json.dumps(
        {
            "batch_num": 1,
            "activation_offset": True,
            "layers.1.v_proj": {
                "kv_data_quant_config": {
                    "act_algo": "ifmr",
                    "max_percentile": 0.999999,
                    "min_percentile": 0.999999,
                    "search_range": [0.7, 1.3],
                    "search_step": 0.01,
                    "quant_granularity": 0,
                }
            },
        },
        indent=4,
    ) + "\n"


def test_cfg_file_wins_and_overrides_count_by_name(tmp_path, model):
    cfg = tmp_path / "kv.cfg"
    cfg.write_text(
        """
        batch_num: 3
        activation_offset: false
        kv_cache_quant_config {
          quant_layers: "layers.*.k_proj"
          quant_layers: "layers.0.v_proj"
          calibration_config {
            ifmr_quantize { search_range_start: 0.8 quant_granularity: per_channel }
          }
        }
        override_layers_configs {
          layer_name: "layers.0.v_proj"
          kv_data_quant_config { hfmg_quantize { num_of_bins: 2048 asymmetric: true } }
        }
        """
    )
    amct.create_quant_cali_config(
        tmp_path / "kv.json", model, {"kv_cache_quant_layers": ["norm"]}, config_definition=cfg
    )
    document = json.loads((tmp_path / "kv.json").read_text())
    assert list(document) == ["batch_num", "activation_offset", *NAMES[:3]]
    assert (document["batch_num"], document["activation_offset"]) == (3, False)
    key = document[NAMES[0]]["kv_data_quant_config"]
    assert key["search_range"] == [0.8, 1.3]
    assert key["quant_granularity"] == 1
    assert document[NAMES[1]]["kv_data_quant_config"] == {
        "act_algo": "hfmg",
        "asymmetric": True,
        "num_of_bins": 2048,
        "quant_granularity": 0,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_bits": 8}, r"kv_data_quant_config\.num_bits: unknown key"),
        ({"quant_granularity": 2}, r"quant_granularity is 2; allowed: 0 \(per tensor\) or 1"),
        ({"quant_granularity": "per_channel"}, r"or 1 \(per channel\)$"),
        ({"search_step": 5.0}, r"search_step is 5\.0; allowed: a number in \(0, 0\.6\]"),
        ({"act_algo": "ifmrr"}, r'act_algo is "ifmrr"; allowed: "ifmr" or "hfmg" \(did you mean'),
        ({"num_of_bins": 1024}, r'num_of_bins: unknown key; it belongs to act_algo "hfmg"'),
    ],
)
def test_wrong_values_in_the_config_are_told_with_their_place(tmp_path, model, change, message):
    config = write_config(tmp_path, model, **change)
    with pytest.raises(ConfigError, match=message):
        amct.create_quant_cali_model(config, tmp_path / "record.txt", model)
    assert not (tmp_path / "record.txt").exists()


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (["layers.0.k_prj"], ArgumentValueError, "did you mean 'layers.0.k_proj'"),
        (["norm"], ArgumentValueError, "it is a LayerNorm; allowed: Linear"),
        (["*.o_proj"], ArgumentValueError, "fits no Linear"),
        ([], ArgumentValueError, "names no layer"),
        ("layers.0.k_proj", ArgumentTypeError, "allowed: a list of layer names"),
    ],
)
def test_wrong_layer_names_are_told(tmp_path, model, layers, error, message):
    with pytest.raises(error, match=message):
        amct.create_quant_cali_config(tmp_path / "c", model, {"kv_cache_quant_layers": layers})
    with pytest.raises(AmctError, match="unknown key"):
        amct.create_quant_cali_config(tmp_path / "c", model, {"kv_cache": ["layers.0.k_proj"]})
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("algorithm", ["ifmr", "hfmg"])
@pytest.mark.parametrize("asymmetric", [True, False])
@pytest.mark.parametrize("per_channel", [0, 1])
def test_factors_fit_what_the_layers_put_out(
    tmp_path, model, dtype, algorithm, asymmetric, per_channel
):
    model = model.to(dtype)
    params = {"act_algo": algorithm, "asymmetric": asymmetric, "quant_granularity": per_channel}
    config = write_config(tmp_path, model, replace=True, **params)
    calibrated = amct.create_quant_cali_model(config, tmp_path / "record.txt", model)
    data = batches(6, dtype)
    with torch.inference_mode():
        for x in data[:-1]:
            assert torch.equal(calibrated(x), model(x))
    assert not (tmp_path / "record.txt").exists()
    with torch.no_grad():
        assert torch.equal(calibrated(data[-1]), model(data[-1]))
    written = (tmp_path / "record.txt").read_bytes()
    calibrated(data[0] * 100)
    assert (tmp_path / "record.txt").read_bytes() == written
    factors = read_kv_factors(tmp_path / "record.txt")
    assert list(factors) == NAMES
    for name, found in factors.items():
        y = outputs_of(model, data, name).float()
        assert len(found.scale) == (y.shape[1] if per_channel else 1)
        assert asymmetric or not any(found.offset)
        scale, offset = torch.tensor(found.scale), torch.tensor(found.offset)
        noise = (INT8.fake_quantize(y, scale, offset) - y).square().sum(0)
        full = INT8.factors(
            *((y.amin(0), y.amax(0)) if per_channel else (y.amin()[None], y.amax()[None])),
            symmetric=not asymmetric,
        )
        bound = (INT8.fake_quantize(y, *full) - y).square().sum(0)
        if not per_channel:
            noise, bound = noise.sum(), bound.sum()
        # The full range is a candidate of both searches; a histogram knows values to a bin only.
        assert bool((noise <= 1.05 * bound).all())


def test_padding_is_left_out_where_there_is_a_mask(tmp_path, model):
    config = write_config(tmp_path, model, quant_granularity=1)
    data = batches(6)
    padded = [torch.cat([torch.full((2, 3, 16), 50.0), x], dim=1) for x in data]

    def record(inputs, name, masked):
        path = tmp_path / name
        calibrated = amct.create_quant_cali_model(config, path, model)
        for i, x in enumerate(inputs):
            mask = torch.ones(x.shape[:2], dtype=torch.long)
            mask[:, :3] = 0
            if not masked:
                calibrated(x)
            elif i % 2:
                calibrated(x, mask)
            else:
                calibrated(x, attention_mask=mask)
        return read_kv_factors(path)["layers.0.k_proj"]

    # The first layer's projections see each token alone, so padding changes nothing else.
    assert record(padded, "a", masked=True) == record(data, "b", masked=False)
    assert record(padded, "c", masked=False) != record(data, "d", masked=False)


def test_layers_that_did_not_run_are_told(tmp_path, caplog):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x)

    amct.create_quant_cali_config(tmp_path / "c", Half(), {"kv_cache_quant": ["a", "b"]})
    with caplog.at_level(logging.WARNING, "amct_pytorch"):
        amct.create_quant_cali_model(tmp_path / "c", tmp_path / "r", Half())(torch.randn(3, 4))
    assert list(read_kv_factors(tmp_path / "r")) == ["a"]
    assert "'b' did not run" in caplog.text


def test_nan_names_layer_and_leaves_no_record(tmp_path, model):
    config = write_config(tmp_path, model)
    calibrated = amct.create_quant_cali_model(config, tmp_path / "r", model)
    with pytest.raises(CalibrationError, match=r"layers\.0\.k_proj.*NaN or infinity"):
        calibrated(torch.full((1, 2, 16), torch.nan))
    with pytest.raises(CalibrationError, match="failed half-way"):
        calibrated(torch.zeros(1, 2, 16))
    assert not (tmp_path / "r").exists()


# --- the operator ---


def test_documented_example_of_the_operator(tmp_path, caplog):
    op = QuantCalibrationOp(tmp_path / "r", {"batch_num": 2, "quant_granularity": "per_channel"})
    x = torch.randn(3, 5, 8)
    assert op("layer0.key", x) is x
    assert op.pending == ("layer0.key",)
    assert not (tmp_path / "r").exists()
    op("layer0.key", x * 2)
    op("layer0.value", x)
    op("layer0.value", x[:, :1])
    found = read_kv_factors(tmp_path / "r")
    assert list(found) == ["layer0.key", "layer0.value"]
    assert len(found["layer0.key"].scale) == 8
    before = (tmp_path / "r").read_bytes()
    op("layer0.key", x * 100)  # its batches are over
    assert (tmp_path / "r").read_bytes() == before
    with caplog.at_level(logging.WARNING, "amct_pytorch"):
        other = QuantCalibrationOp(str(tmp_path / "r"), {"with_offset": False})
        other("layer0.key", x)
    assert "overwrote the KV-cache factors of layer0.key" in caplog.text
    found = read_kv_factors(tmp_path / "r")
    assert found["layer0.key"].offset == (0,)
    assert len(found["layer0.value"].scale) == 8


def test_all_spellings_of_granularity():
    for given, channels in (
        (0, 1),
        ("0", 1),
        ("per_tensor", 1),
        (1, 4),
        ("1", 4),
        ("per_channel", 4),
    ):
        op = QuantCalibrationOp("never_written", {"quant_granularity": given, "batch_num": 9})
        op("x", torch.randn(2, 4))
        assert len(op._observers["x"].factors().scale) == channels


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"batchnum": 2}, ArgumentValueError, "batchnum: unknown key.*did you mean 'batch_num'"),
        ({"batch_num": 0}, ArgumentValueError, "batch_num is 0; allowed: an integer >= 1"),
        ({"num_bits": 16}, ArgumentValueError, "num_bits is 16; allowed: 8"),
        ({"quant_granularity": "channel"}, ArgumentValueError, 'is "channel"; allowed: 0, "0"'),
        ({"act_algo": "minmax"}, ArgumentValueError, 'act_algo is "minmax"; allowed: "ifmr"'),
        ([("batch_num", 2)], ArgumentTypeError, "allowed: a dict"),
    ],
)
def test_wrong_parameters_of_the_operator(tmp_path, params, error, message):
    with pytest.raises(error, match=message):
        QuantCalibrationOp(tmp_path / "r", params)
    with pytest.raises(ArgumentValueError, match="quant_method"):
        QuantCalibrationOp(tmp_path / "r", quant_method="kv")


def test_operator_refuses_what_does_not_fit(tmp_path):
    op = QuantCalibrationOp(tmp_path / "r", {"batch_num": 3, "quant_granularity": 1})
    op("x", torch.randn(2, 4))
    for wrong, message in (
        (torch.randn(2, 5), "5 channels after 4"),
        (torch.ones(2, 4, dtype=torch.int32), "a floating tensor"),
        (torch.full((2, 4), torch.inf), "NaN or infinity"),
    ):
        with pytest.raises(CalibrationError, match=message):
            op("x", wrong)
    with pytest.raises(CalibrationError, match="mask"):
        op("x", torch.randn(2, 4), torch.ones(3))


# --- the shared record ---


def test_what_else_the_record_holds_stays(tmp_path):
    path = tmp_path / "r"
    path.write_text(
        'record { key: "a" value { scale_d: 0.5 offset_d: 1 scale_w: 0.25 offset_w: 0 } }\n'
        'record { key: "b" kv_cache_value { scale: 1 offset: -3 } }\n'
    )
    add_kv_factors(path, {"a": KvFactors((2.0, 3.0), (4, 5))})
    from amct_pytorch.record.record_file import read_record

    assert read_record(path).factors["a"].scale_d == 0.5
    assert read_kv_factors(path) == {
        "a": KvFactors((2.0, 3.0), (4, 5)),
        "b": KvFactors((1.0,), (-3,)),
    }


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("scale: 0 offset: 0", r"b\.kv_cache_value\.scale\[0\] is 0"),
        ("scale: 1 offset: 128", r"offset\[0\] is 128; allowed: -128 to 127"),
        ("scale: 1", "equally many"),
    ],
)
def test_a_damaged_record_is_told_and_left_as_it_is(tmp_path, model, value, message):
    path = tmp_path / "r"
    path.write_text(f'record {{ key: "b" kv_cache_value {{ {value} }} }}\n')
    before = path.read_bytes()
    with pytest.raises(RecordError, match=message):
        amct.create_quant_cali_model(write_config(tmp_path, model), path, model)
    with pytest.raises(RecordError, match=message):
        add_kv_factors(path, {"a": KvFactors((2.0,), (4,))})
    assert path.read_bytes() == before


WRITER = """
import sys
from amct_pytorch.record.kv_cache import KvFactors, add_kv_factors
who = sys.argv[1]
print("ready", flush=True)
sys.stdin.readline()
for i in range(int(sys.argv[2])):
    add_kv_factors("record.txt", {f"{who}.{i}": KvFactors((1.0,) * 64, (0,) * 64)})
"""


def start_writer(folder, who, number):
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, who, str(number)],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout.readline() == "ready\n"
    return writer


@pytest.mark.skipif(os.name != "posix", reason="needs advisory locks and signals")
def test_processes_share_a_record_and_a_killed_one_harms_nothing(tmp_path):
    writers = [start_writer(tmp_path, f"w{i}", 12) for i in range(2)]
    doomed = start_writer(tmp_path, "doomed", 10_000)
    for writer in (*writers, doomed):
        writer.stdin.write("\n")
        writer.stdin.flush()
    until = time.monotonic() + 60
    while not (tmp_path / "record.txt").exists() and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.3)
    doomed.send_signal(signal.SIGKILL)
    for process in (*writers, doomed):
        process.communicate(timeout=120)
    found = read_kv_factors(tmp_path / "record.txt")
    # Nobody's factors are lost, and those of the killed process are there up to some moment.
    assert {f"w{i}.{n}" for i in range(2) for n in range(12)} <= set(found)
    doomed_numbers = sorted(int(n.split(".")[1]) for n in found if n.startswith("doomed"))
    assert doomed_numbers == list(range(len(doomed_numbers)))
    add_kv_factors(tmp_path / "record.txt", {"after": KvFactors((1.0,), (0,))})
    left = [p.name for p in tmp_path.iterdir() if p.name.startswith(".amct")]
    assert left == []


def test_changes_between_two_additions_are_kept(tmp_path, monkeypatch):
    record, factors = tmp_path / "record.txt", KvFactors((1.0, 0.5), (0, 3))
    add_kv_factors(record, {"a": factors})
    add_kv_factors(record, {"b": factors})
    record.write_text(record.read_text().replace("scale: 0.5", "scale: 0.25"))
    add_kv_factors(record, {"c": factors})
    changed = KvFactors((1.0, 0.25), (0, 3))
    assert read_kv_factors(record) == {"a": changed, "b": changed, "c": factors}

    # What could not be written is not taken to be there by the next addition either.
    def full(*_, **__):
        raise FileAccessError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("amct_pytorch.record.kv_cache.write_whole", full)
        with pytest.raises(FileAccessError):
            add_kv_factors(record, {"lost": factors})
    add_kv_factors(record, {"d": factors})
    assert list(read_kv_factors(record)) == ["a", "b", "c", "d"]
