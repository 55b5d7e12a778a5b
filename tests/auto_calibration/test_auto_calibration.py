"""accuracy_based_auto_calibration: the search, its files, and what it refuses."""

import json
import logging
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

import amct_pytorch as amct
from amct_pytorch.common.auto_calibration import (
    AutoCalibrationEvaluatorBase,
    AutoCalibrationStrategyBase,
    CosineSimilaritySensitivity,
    SensitivityBase,
)
from amct_pytorch.errors import ArgumentTypeError, ArgumentValueError, CalibrationError
from amct_pytorch.observers.statistics import Agreement
from amct_pytorch.record.record_file import read_record

HERE = Path(__file__).parent
STEM = "accuracy_based_auto_calibration"
LAYERS = 8
BAD = ("layers.2", "layers.5")


class Network(nn.Module):
    """Residual convolutions; two of them have inputs that 8 bits per tensor cannot hold."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(LAYERS))
        self.spread = torch.ones(8, 1, 1)
        self.spread[0] = 3000.0

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            wide = f"layers.{index}" in BAD
            y = layer(x * self.spread) if wide else layer(x)
            x = x + torch.tanh(y / (1000.0 if wide else 1.0))
        return x


def network():
    net = Network().eval()
    with torch.no_grad():
        for name in BAD:
            layer = net.get_submodule(name)
            layer.weight[:, 0] /= 3000.0
            layer.weight[:, 1:] *= 1000.0
            layer.weight[:, 0] *= 1000.0
    return net


def images(seed, number=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 8, 6, 6, generator=generator) for _ in range(number)]


class Evaluator(AutoCalibrationEvaluatorBase):
    """Agreement with the float network on other images."""

    def __init__(self, least_db):
        self.least_db = least_db
        self.net = network()
        self.evaluated = []
        self.calibrated = 0

    def calibration(self, model):
        self.calibrated += 1
        with torch.no_grad():
            for x in images(1):
                model(x)

    def outputs(self, run):
        with torch.no_grad():
            return torch.cat([torch.as_tensor(run(x)) for x in images(2)])

    def evaluate(self, model):
        found = self.outputs(model)
        metric = min(Agreement.between(self.outputs(self.net), found).sqnr_db, 200.0)
        self.evaluated.append(metric)
        return metric

    def metric_eval(self, original_metric, new_metric):
        return new_metric >= self.least_db, original_metric - new_metric


def search(evaluator, model=None, **changes):
    model = network() if model is None else model
    example = images(1)[0]
    if not Path("config.json").exists():
        amct.create_quant_config("config.json", model, example, batch_num=2)
    amct.accuracy_based_auto_calibration(
        model, evaluator, "config.json", "record.txt", "out/net", example, **changes
    )


def read(name):
    return json.loads(Path(f"out/{STEM}_{name}.json").read_text())


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def levels():
    """SQNR with all layers quantized, and with the bad ones in float."""
    evaluator = Evaluator(-math.inf)
    search(evaluator)
    for file in Path("out").iterdir():
        file.unlink()
    return evaluator.evaluated[1]


def test_a_config_that_is_good_enough_is_saved_as_it_is():
    evaluator = Evaluator(-100.0)
    search(evaluator)
    assert len(evaluator.evaluated) == 2 and evaluator.calibrated == 1
    assert {file.name for file in Path("out").iterdir()} == {
        "net_fake_quant_model.onnx", "net_deploy_model.onnx", "net_ledger.json",
        f"{STEM}_final_config.json", f"{STEM}_record.json",
    }  # fmt: skip
    assert read("final_config") == json.loads(Path("config.json").read_text())
    assert [trial["rolled_back"] for trial in read("record")["trials"]] == [[]]


def test_sensitive_layers_go_back_to_float_until_it_is_good_enough():
    plain = levels()
    evaluator = Evaluator(plain + 6)
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    as_given = Path("config.json").read_bytes()
    search(evaluator, model)
    given = json.loads(Path("config.json").read_text())
    final = read("final_config")
    assert Path("config.json").read_bytes() == as_given
    rolled_back = {name for name in given if isinstance(given[name], dict)
                   and given[name]["quant_enable"] and not final[name]["quant_enable"]}  # fmt: skip
    assert rolled_back == set(BAD)
    assert {name: value for name, value in final.items() if name not in rolled_back} == {
        name: value for name, value in given.items() if name not in rolled_back
    }
    ranking = read("ranking_information")
    assert [name for name, _ in ranking[:2]] in ([*BAD], [*reversed(BAD)])
    assert [score for _, score in ranking] == sorted(score for _, score in ranking)
    trials = read("record")["trials"]
    assert len(trials) <= math.log2(LAYERS) + 2
    assert len(trials) == len(evaluator.evaluated) - 1 and evaluator.calibrated == 1
    assert not trials[0]["accepted"] and len(trials[1]["rolled_back"]) == LAYERS // 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    # What was evaluated is what the files compute.
    accepted = [trial for trial in trials if set(trial["rolled_back"]) == rolled_back]
    session = amct.DeploySession("out/net_deploy_model.onnx")
    deployed = evaluator.outputs(lambda x: session.run(None, {"x": x.numpy()})[0])
    found = Agreement.between(evaluator.outputs(evaluator.net), deployed).sqnr_db
    # Float operators between the layers round differently in torch and ONNX Runtime.
    assert found == pytest.approx(accepted[0]["metric"], abs=0.05)
    fake = ort.InferenceSession("out/net_fake_quant_model.onnx")
    simulated = evaluator.outputs(lambda x: fake.run(None, {"x": x.numpy()})[0])
    found = Agreement.between(evaluator.outputs(evaluator.net), simulated).sqnr_db
    assert found == pytest.approx(accepted[0]["metric"], abs=0.05)
    record = Path("record.txt").read_text()
    assert all((f'"{name}"' in record) == (name not in rolled_back) for name in
               (f"layers.{i}" for i in range(LAYERS)))  # fmt: skip
    ledger = json.loads(Path("out/net_ledger.json").read_text())
    float_layers = {layer["name"] for layer in ledger["layers"] if layer["status"] == "float"}
    assert float_layers == rolled_back

    # The config that was found, calibrated anew, gives the record that was written.
    final_config = f"out/{STEM}_final_config.json"
    alone = amct.quantize_model(final_config, "m.onnx", "alone.txt", model, images(1)[0])
    evaluator.calibration(alone)
    assert read_record("alone.txt").factors == read_record("record.txt").factors
    with torch.no_grad():
        for x in images(2):
            torch.testing.assert_close(
                alone(x), torch.as_tensor(session.run(None, {"x": x.numpy()})[0])
            )


def test_an_interrupted_search_goes_on_and_ends_alike():
    plain = levels()
    whole = Evaluator(plain + 6)
    search(whole)
    final, trials = read("final_config"), read("record")["trials"]
    for file in Path("out").iterdir():
        file.unlink()

    class Killed(Evaluator):
        def evaluate(self, model):
            if len(self.evaluated) == 3:
                raise KeyboardInterrupt
            return super().evaluate(model)

    with pytest.raises(KeyboardInterrupt):
        search(Killed(plain + 6))
    assert read("record")["trials"] == trials[:2]
    assert not Path("out/net_deploy_model.onnx").exists()
    again = Evaluator(plain + 6)
    search(again)
    assert read("final_config") == final
    assert read("record")["trials"] == trials
    # The float model, and the trials that had not been run.
    assert len(again.evaluated) == 1 + len(trials) - 2


SEARCH_IN_A_PROCESS = """
import os, signal, sys
sys.path.insert(0, {folder!r})
import test_auto_calibration as here

class Killed(here.Evaluator):
    def evaluate(self, model):
        if len(self.evaluated) == {trials}:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().evaluate(model)

here.search(Killed({least_db}))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no such signal here")
def test_a_killed_process_loses_no_trial():
    plain = levels()
    search(Evaluator(plain + 6))
    final, trials = read("final_config"), read("record")["trials"]
    for file in Path("out").iterdir():
        file.unlink()
    code = SEARCH_IN_A_PROCESS.format(folder=str(HERE), trials=3, least_db=plain + 6)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert read("record")["trials"] == trials[:2]
    again = Evaluator(plain + 6)
    search(again)
    assert read("final_config") == final
    assert read("record")["trials"] == trials
    assert len(again.evaluated) == 1 + len(trials) - 2


class Clock:
    """Time that passes only when something is evaluated."""

    now = 0.0

    def perf_counter(self):
        return self.now


def timed_evaluator(monkeypatch):
    """A class of evaluators for which each evaluation takes 10 s of a clock of its own."""
    clock = Clock()
    monkeypatch.setattr("amct_pytorch.flows.auto_calibration.time", clock)

    class Timed(Evaluator):
        def evaluate(self, model):
            clock.now += 10.0
            return super().evaluate(model)

    return Timed


def test_the_best_so_far_is_saved_when_time_is_up(monkeypatch, caplog):
    plain = levels()
    search(Evaluator(plain + 6))
    needed = read("final_config")
    for file in Path("out").iterdir():
        file.unlink()
    timed = timed_evaluator(monkeypatch)
    with caplog.at_level(logging.WARNING):
        search(timed(plain + 6), time_budget=35)
    assert (
        "time_budget: the search ends before it was done; layers in float so far: 4" in caplog.text
    )
    # All quantized, then the worse half in float, which is enough; a fourth evaluation
    # would have taken 40 s.
    assert [trial["accepted"] for trial in read("record")["trials"]] == [False, True]
    final = read("final_config")
    layers = {name: layer for name, layer in final.items() if name.startswith("layers.")}
    off = {name for name, layer in layers.items() if not layer["quant_enable"]}
    assert off == set(read("record")["trials"][1]["rolled_back"])
    assert Path("out/net_deploy_model.onnx").exists()
    # With time, the same call goes on from there.
    again = timed(plain + 6)
    search(again)
    assert read("final_config") == needed
    assert len(again.evaluated) == 1 + len(read("record")["trials"]) - 2


def test_nothing_is_written_when_time_is_up_before_anything_was_good_enough(monkeypatch, caplog):
    timed = timed_evaluator(monkeypatch)
    search(timed(1000.0), time_budget=25)
    assert "no trial was good enough within the time_budget of 25 s" in caplog.text
    assert not Path("out/net_deploy_model.onnx").exists()


@pytest.mark.parametrize("budget", [0, -1, True, "1", float("nan")])
def test_wrong_budgets_are_told(budget):
    with pytest.raises(ArgumentValueError, match=r"time_budget is .*seconds above 0"):
        search(Evaluator(0.0), time_budget=budget)


def test_layers_that_were_balanced_and_learned_go_back_to_float_as_they_were():
    amct.create_quant_config("config.json", network(), images(1)[0], batch_num=2)
    config = json.loads(Path("config.json").read_text())
    for name, layer in config.items():
        if name.startswith("layers."):
            layer["weight_quant_params"] = {"wts_algo": "ada_quantize", "num_bits": 4,
                                            "num_iteration": 10, "channel_wise": True}  # fmt: skip
            if name not in BAD:
                layer["dmq_balancer_param"] = 0.5
    Path("config.json").write_text(json.dumps(config))
    model = network()
    amct.quantize_preprocess("config.json", "record.txt", model, images(1)[0])(images(1)[0])
    # More than 4 bits can give: the best layer alone stays quantized, or none.
    evaluator = Evaluator(-math.inf)
    search(evaluator)
    plain = evaluator.evaluated[1]
    evaluator = Evaluator(plain + 12)
    search(evaluator)
    trials = read("record")["trials"]
    assert trials[-1]["metric"] > plain
    session = amct.DeploySession("out/net_deploy_model.onnx")
    name = session.get_inputs()[0].name
    found = evaluator.outputs(lambda x: session.run(None, {name: x.numpy()})[0])
    saved = Agreement.between(evaluator.outputs(evaluator.net), found).sqnr_db
    accepted = [trial["metric"] for trial in trials if trial["accepted"]]
    assert min(abs(saved - metric) for metric in accepted) < 0.01


def test_balance_factors_of_layers_that_go_back_to_float_stay_in_the_record():
    amct.create_quant_config("config.json", network(), images(1)[0], batch_num=2)
    config = json.loads(Path("config.json").read_text())
    for name, layer in config.items():
        if name.startswith("layers."):
            layer["dmq_balancer_param"] = 0.5
    Path("config.json").write_text(json.dumps(config))
    amct.quantize_preprocess("config.json", "record.txt", network(), images(1)[0])(images(1)[0])
    before = {name: found.balance for name, found in read_record("record.txt").factors.items()}

    class SecondTrial(Evaluator):
        def metric_eval(self, original_metric, new_metric):
            return len(self.evaluated) > 2, 0.0

    search(SecondTrial(0.0), strategy=OneByOne(), sensitivity=ByName())
    factors = read_record("record.txt").factors
    assert not factors["layers.0"].complete and factors["layers.1"].complete
    assert {name: found.balance for name, found in factors.items()} == before
    # So another search with the same record can quantize them.
    search(Evaluator(-100.0))
    assert all(found.complete for found in read_record("record.txt").factors.values())


def test_another_target_judges_the_same_trials_anew():
    plain = levels()
    search(Evaluator(plain - 1))
    assert len(read("record")["trials"]) == 1
    evaluator = Evaluator(plain + 6)
    search(evaluator)
    trials = read("record")["trials"]
    assert trials[0]["accepted"] is False
    assert len(evaluator.evaluated) == len(trials)  # the first one is known, the float model not


def test_metrics_that_no_file_holds_are_evaluated_again():
    class Pairs(Evaluator):
        def evaluate(self, model):
            return (super().evaluate(model), "dB")

        def metric_eval(self, original_metric, new_metric):
            assert isinstance(new_metric, tuple)
            return super().metric_eval(original_metric[0], new_metric[0])

    search(Pairs(-100.0))
    evaluator = Pairs(-100.0)
    search(evaluator)
    assert len(evaluator.evaluated) == 2


@pytest.mark.parametrize("what", ["weight", "last bias", "config"])
def test_trials_of_another_search_do_not_count(what):
    search(Evaluator(-100.0))
    other = network()
    with torch.no_grad():
        if what == "weight":
            other.layers[0].weight *= 1.1
        elif what == "last bias":  # no factor depends on it
            other.layers[-1].bias += 0.1
    if what == "config":
        text = Path("config.json").read_text()
        Path("config.json").write_text(text.replace("{", '{"bias_correction": false,', 1))
    evaluator = Evaluator(-100.0)
    search(evaluator, other)
    assert len(evaluator.evaluated) == 2


def test_trials_that_were_evaluated_otherwise_do_not_count(caplog):
    class OnOthers(Evaluator):
        def evaluate(self, model):
            return super().evaluate(model) - 1.0

    search(Evaluator(-100.0))
    evaluator = OnOthers(-100.0)
    search(evaluator)
    assert "was evaluated otherwise, so its 1 trials are run again" in caplog.text
    assert len(evaluator.evaluated) == 2
    assert read("record")["float_metric"] == 199.0


def test_what_was_known_survives_a_second_interruption():
    plain = levels()
    search(Evaluator(plain + 6))
    trials = read("record")["trials"]

    class NoTime(CosineSimilaritySensitivity):
        def compare(self, data, other):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(Evaluator(plain + 6), sensitivity=NoTime())
    assert read("record")["trials"] == trials[:1]
    again = Evaluator(plain + 6)
    search(again)
    assert read("record")["trials"] == trials
    assert "earlier" not in read("record")
    assert len(again.evaluated) == 1


def test_nothing_is_written_where_nothing_is_good_enough(caplog):
    evaluator = Evaluator(190.0)
    search(evaluator)
    assert "no model is written" in caplog.text
    assert {file.name for file in Path("out").iterdir()} == {
        f"{STEM}_ranking_information.json", f"{STEM}_record.json",
    }  # fmt: skip
    assert not Path("record.txt").exists()
    assert not any(trial["accepted"] for trial in read("record")["trials"])


class ByName(SensitivityBase):
    """Ranks in the order of the network."""

    def __init__(self):
        self.calls = 0

    def compare(self, data, other):
        assert data.shape == other.shape
        self.calls += 1
        return float(self.calls)


class OneByOne(AutoCalibrationStrategyBase):
    """Rolls one more layer back each time."""

    def initialize(self, ranking_info):
        self.names = [name for name, _ in ranking_info]
        self.number = 0

    def update_quant_config(self, metric_eval):
        if not (metric_eval[0] and self.number):
            self.number += 1
        elif self.number:
            return True, self.flags()
        return False, self.flags()

    def flags(self):
        return {name: index >= self.number for index, name in enumerate(self.names)}


def test_strategies_and_sensitivities_of_the_users_own():
    plain = levels()
    evaluator, measure = Evaluator(plain + 6), ByName()
    search(evaluator, strategy=OneByOne(), sensitivity=measure)
    assert measure.calls == LAYERS
    assert [name for name, _ in read("ranking_information")] == [
        f"layers.{i}" for i in range(LAYERS)
    ]
    # layers.5 is the sixth.
    assert [len(trial["rolled_back"]) for trial in read("record")["trials"]] == list(range(7))


class Endless(OneByOne):
    def update_quant_config(self, metric_eval):
        return False, self.flags()


class AllBack(OneByOne):
    def update_quant_config(self, metric_eval):
        return False, dict.fromkeys(self.names, False)


class Unknown(OneByOne):
    def update_quant_config(self, metric_eval):
        return True, {"layers.0": True}


class NoPair(OneByOne):
    def update_quant_config(self, metric_eval):
        return True


@pytest.mark.parametrize(
    ("strategy", "error", "message"),
    [
        (Endless(), CalibrationError, "has not stopped after 33 trials for 8 layers"),
        (AllBack(), CalibrationError, "rolls back every layer and does not stop"),
        (Unknown(), ArgumentValueError, r"flags and the ranking differ in 'layers.1'"),
        (NoPair(), ArgumentTypeError, "update_quant_config returned true; allowed: whether"),
        (OneByOne, ArgumentTypeError, "strategy is the class OneByOne; allowed: BinarySearch, or "),
        ("Binary", ArgumentValueError, "strategy is .Binary. .did you mean 'BinarySearch'"),
        (3, ArgumentTypeError, "strategy is int; allowed"),
    ],
)
def test_wrong_strategies_are_told(strategy, error, message):
    with pytest.raises(error, match=message):
        search(Evaluator(190.0), strategy=strategy)
    assert not Path("record.txt").exists()


def test_other_wrong_arguments_are_told(monkeypatch):
    with pytest.raises(ArgumentTypeError, match="model_evaluator is object; allowed: an instance"):
        search(object())
    with pytest.raises(ArgumentValueError, match=r"sensitivity is .Cosine."):
        search(Evaluator(0.0), sensitivity="Cosine")
    lazy = Evaluator(0.0)
    monkeypatch.setattr(lazy, "calibration", lambda model: model(images(1)[0]))
    with pytest.raises(CalibrationError, match=r"fewer than the config's batch_num \(2\)"):
        search(lazy)
    vague = Evaluator(0.0)
    monkeypatch.setattr(vague, "metric_eval", lambda original, new: True)
    with pytest.raises(ArgumentTypeError, match="metric_eval returned true; allowed"):
        search(vague)
    with pytest.raises(ArgumentValueError, match=r"save_dir is .config\.json., a file that exists"):
        amct.accuracy_based_auto_calibration(
            network(), Evaluator(0.0), "config.json", "record.txt", "config.json", images(1)[0]
        )
    assert not Path("record.txt").exists()


def test_driven_by_files_alone():
    Path("data").mkdir()
    for index, x in enumerate(images(1)):
        x.numpy().astype(np.float32).tofile(f"data/{index}.bin")

    evaluator = amct.ModelEvaluator("data", "x:2,8,6,6", "float32")
    # All batches of the config are run, not the one that is the evaluator's own default.
    evaluator.allowed_loss = 0.5
    search(evaluator)
    assert Path("out/net_deploy_model.onnx").exists()
    assert read("record")["float_metric"] == 1.0
    assert 0.5 <= read("record")["trials"][-1]["metric"] < 1.0


def test_the_batch_that_layers_are_ranked_on_is_kept_on_disk_and_gone_afterwards(
    tmp_path, monkeypatch
):
    kept = tmp_path / "kept"
    kept.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(kept))
    search(Evaluator(190.0))
    assert f"inputs to rank on are kept in {kept}" in Path("amct_log/amct_pytorch.log").read_text()
    # What torch makes there for its own sake stays.
    left = [path for path in kept.iterdir() if not path.name.startswith("torchinductor")]
    assert not left, left
