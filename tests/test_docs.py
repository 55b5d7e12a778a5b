"""What the documentation shows can be pasted and runs."""

from __future__ import annotations

import inspect
import json
import re
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import nn

import amct_pytorch as amct
from amct_pytorch.config.qat_operator import DataConfig, OperatorConfig, OperatorWeightConfig
from amct_pytorch.flows.distillation import distill
from amct_pytorch.low_bit.built_in import BUILT_IN
from amct_pytorch.low_bit.gptq import GptqOptions

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
AUTO_CALIBRATION_GUIDE = ROOT / "docs" / "auto_calibration.md"
CLI_GUIDE = ROOT / "docs" / "cli.md"
DECOMPOSITION_GUIDE = ROOT / "docs" / "decomposition.md"
DISTILLATION_GUIDE = ROOT / "docs" / "distillation.md"
FORMATS_GUIDE = ROOT / "docs" / "formats.md"
GPTQ_GUIDE = ROOT / "docs" / "gptq.md"
LOW_BIT_GUIDE = ROOT / "docs" / "low_bit_algorithms.md"
PRUNING_GUIDE = ROOT / "docs" / "pruning.md"
PTQ_GUIDE = ROOT / "docs" / "ptq.md"
QAT_GUIDE = ROOT / "docs" / "qat.md"
QAT_OPERATORS_GUIDE = ROOT / "docs" / "qat_operators.md"
SPARSITY_GUIDE = ROOT / "docs" / "sparsity.md"
QUANTIZE_GUIDE = ROOT / "docs" / "low_bit.md"


def test_the_script_of_the_readme_runs(tmp_path, monkeypatch):
    script = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert script is not None
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(script.group(1), str(README), "exec"), names)

    logits, calibrated, batches = names["logits"], names["calibrated"], names["batches"]
    with torch.no_grad():
        simulated = calibrated(batches[0]).numpy()
    # The same integers; only the last float multiplication may be rounded otherwise.
    np.testing.assert_allclose(logits, simulated, rtol=1e-5, atol=1e-6)
    written = {file.name for file in (tmp_path / "out").iterdir()}
    mentioned = set(re.findall(r"^\| `([a-z_.]+)`", README.read_text(), re.MULTILINE))
    assert mentioned <= written


def test_the_cfg_of_the_guide_is_accepted_and_does_what_it_says(tmp_path, monkeypatch):
    text = re.search(r"```\n(# quant\.cfg\n.*?)```", PTQ_GUIDE.read_text(), re.DOTALL)
    assert text is not None
    monkeypatch.chdir(tmp_path)
    Path("quant.cfg").write_text(text.group(1))
    features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten())
    model = nn.Sequential(OrderedDict(features=features, classifier=nn.Linear(4 * 16, 5)))

    example = torch.zeros(2, 3, 8, 8)
    amct.create_quant_config("config.json", model.eval(), example, config_defination="quant.cfg")

    config = json.loads(Path("config.json").read_text())
    assert config["batch_num"] == 4
    assert config["features.0"]["quant_enable"] is False
    assert config["features.2"]["quant_enable"] is True
    assert config["classifier"]["activation_quant_params"]["asymmetric"] is False


def test_the_keys_that_the_guide_names_are_keys_of_the_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    amct.create_quant_config("config.json", model, torch.zeros(2, 3, 8, 8))
    written = Path("config.json").read_text()
    table = PTQ_GUIDE.read_text().split("## 3 The config")[1].split("## 4")[0]
    first_cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    named = {key for cell in first_cells for key in re.findall(r"`(\w+)`", cell)}
    not_written_by_default = {
        "asymmetric",
        "bias_correction",
        "cross_layer_equalization",
        "dmq_balancer_param",
        "linear_channel_wise",
    }
    assert len(named) > 8
    assert {key for key in named if f'"{key}"' not in written} <= not_written_by_default


def test_the_script_of_the_decomposition_guide_runs_and_its_options_exist(tmp_path, monkeypatch):
    text = DECOMPOSITION_GUIDE.read_text()
    script = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert script is not None
    monkeypatch.chdir(tmp_path)
    # On a busy machine the pieces may happen to be slower.
    monkeypatch.setattr("amct_pytorch.flows.decomposition.measure", lambda *_: (2.0, 1.0))
    names: dict[str, object] = {}
    exec(compile(script.group(1), str(DECOMPOSITION_GUIDE), "exec"), names)
    example = names["batches"][0]
    torch.testing.assert_close(names["fresh"](example), names["model"](example))
    assert names["changes"] == {"2": ["2.0", "2.1"]}
    parameters = inspect.signature(amct.auto_decomposition).parameters
    table = text.split("## Options")[1].split("## Files")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"(\w+)(?:=|`)", cell)}
    assert set(parameters) - {"model", "decompose_info_path"} <= named


def test_the_script_of_the_formats_guide_runs_and_its_table_names_every_format():
    text = FORMATS_GUIDE.read_text()
    script = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert script is not None
    names: dict[str, object] = {}
    exec(compile(script.group(1), str(FORMATS_GUIDE), "exec"), names)
    assert names["packed"].shape == (64, 128)
    half_step = names["params"].scale.max() / 2
    # At the ends up to half a step more: the offset is rounded too.
    assert (names["restored"] - names["weight"]).abs().max() <= 2 * half_step
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == 2 * list(names["FORMATS"])


def test_the_script_of_the_gptq_guide_runs_and_its_options_exist():
    text = GPTQ_GUIDE.read_text()
    script = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert script is not None
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(script.group(1), str(GPTQ_GUIDE), "exec"), names)
    layers = names["model"].amct_ledger.layers
    assert [layer.status for layer in layers] == ["deployed"] * 6
    table = text.split("## Options")[1].split("## What")[0]
    told = dict(re.findall(r"^\| `(\w+)` \| ([\w.]+) \|", table, re.MULTILINE))
    assert told == {name: str(value) for name, value in GptqOptions().model_dump().items()}


def test_the_script_of_the_low_bit_guide_runs_and_its_table_names_every_algorithm():
    text = LOW_BIT_GUIDE.read_text()
    script = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert script is not None
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(script.group(1), str(LOW_BIT_GUIDE), "exec"), names)
    layers = names["model"].amct_ledger.layers
    assert [layer.status for layer in layers] == ["deployed"] * 2
    told = set(re.findall(r"^\| `(\w+)`", text, re.MULTILINE))
    assert told == {name for name, *_ in BUILT_IN} - {"minmax", "gptq"}


def test_the_script_of_the_quantize_guide_runs(tmp_path, monkeypatch):
    script = re.search(r"```python\n(.*?)```", QUANTIZE_GUIDE.read_text(), re.DOTALL)
    assert script is not None
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(script.group(1), str(QUANTIZE_GUIDE), "exec"), names)
    batch = names["batches"][0]
    with torch.no_grad():
        assert torch.equal(names["again"](batch), names["model"](batch))
    told = [entry.weights for entry in names["model"].amct_ledger.layers]
    assert told == ["int4 by group of 64, asymmetric", "int8 by channel"]


def test_the_script_of_the_search_guide_runs(tmp_path, monkeypatch):
    script = re.search(r"```python\n(.*?)```", AUTO_CALIBRATION_GUIDE.read_text(), re.DOTALL)
    assert script is not None
    monkeypatch.chdir(tmp_path)
    exec(compile(script.group(1), str(AUTO_CALIBRATION_GUIDE), "exec"), {})
    record = json.loads(Path("out/accuracy_based_auto_calibration_record.json").read_text())
    assert record["trials"][-1]["accepted"] == Path("out/net_deploy_model.onnx").exists()


def test_the_script_of_the_distillation_guide_runs_and_its_settings_exist(tmp_path, monkeypatch):
    text = DISTILLATION_GUIDE.read_text()
    script = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert script is not None
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(script.group(1), str(DISTILLATION_GUIDE), "exec"), names)
    blocks = names["distilled"].outcomes
    assert [block.layers for block in blocks] == [["0"], ["3"], ["8"]]
    assert all(block.loss_after <= block.loss_before for block in blocks)
    assert Path("out/net_deploy_model.onnx").exists()
    table = text.split("## Settings")[1].split("## What")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    given = {"model", "compress_model", "config_file"}
    assert named == set(inspect.signature(distill).parameters) - given


def test_the_scripts_of_the_pruning_guide_run(tmp_path, monkeypatch, capsys):
    scripts = re.findall(r"```python\n(.*?)```", PRUNING_GUIDE.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for script in scripts:
        exec(compile(script, str(PRUNING_GUIDE), "exec"), names)
    assert names["pruned"][0].out_channels == 16
    assert names["restored"][3].weight.shape == (32, 16, 3, 3)
    # The group is printed as the guide shows it.
    shown = re.findall(r"^# (  producer.*|  follower.*|  consumer.*|group 0.*)$", scripts[1], re.M)
    printed = capsys.readouterr().out
    assert len(shown) == 5
    assert all(line in printed for line in shown)


def test_the_scripts_of_the_sparsity_guide_run(tmp_path, monkeypatch):
    scripts = re.findall(r"```python\n(.*?)```", SPARSITY_GUIDE.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for script in scripts:
        exec(compile(script, str(SPARSITY_GUIDE), "exec"), names)
    for file in ("found.cfg", "halves.cfg", "out/net_ledger.json", "out/both_deploy_model.onnx"):
        assert Path(file).exists(), file
    ledger = json.loads(Path("found_ledger.json").read_text())
    assert ledger["compress_ratio"][1] >= 1.6
    entries = json.loads(Path("out/both_ledger.json").read_text())["layers"]
    assert [entry["status"] for entry in entries] == ["float", "quantized", "quantized"]


def test_the_scripts_of_the_operators_guide_run_and_its_keys_exist(tmp_path, monkeypatch):
    text = QAT_OPERATORS_GUIDE.read_text()
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for script in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(script, str(QAT_OPERATORS_GUIDE), "exec"), names)
    session = amct.DeploySession("out/net_deploy_model.onnx")
    deployed = session.run(None, {"image": names["images"].numpy()})[0]
    with torch.no_grad():
        trained = names["model"](names["images"]).numpy()
    # A few inputs next to a half fall on its other side: a step of 8 bits each.
    np.testing.assert_allclose(deployed, trained, rtol=0, atol=0.02 * np.abs(trained).max())

    table = text.split("## 3 The config")[1].split("Behind a ReLU")[0]
    named = {
        key
        for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        for key in re.findall(r"`(\w+)`", cell)
    }
    blocks = (OperatorConfig, DataConfig, OperatorWeightConfig)
    assert named == {key for block in blocks for key in block.model_fields}


def test_the_scripts_of_the_training_guide_run_and_its_keys_exist(tmp_path, monkeypatch):
    text = QAT_GUIDE.read_text()
    train, restore, tune = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(train, str(QAT_GUIDE), "exec"), names)
    session = amct.DeploySession("out/net_deploy_model.onnx")
    deployed = session.run(None, {"image": names["example"].numpy()})[0]
    np.testing.assert_allclose(deployed, names["logits"].numpy(), rtol=1e-5, atol=1e-6)
    before = names["trained"].state_dict()
    exec(compile(restore, str(QAT_GUIDE), "exec"), names)
    after = names["trained"].state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    exec(compile(tune, str(QAT_GUIDE), "exec"), names)
    images = torch.cat([images for images, _ in names["loader"]])
    target = names["teacher"](images)
    untrained = amct.create_quant_retrain_model(
        "out/retrain.json", names["model"], "out/other.txt", names["example"]
    )
    names["train_mode"](untrained)
    untrained(names["example"])

    def error(network: nn.Module) -> float:
        with torch.no_grad():
            return float((network.eval()(images) - target).square().mean())

    assert error(names["student"]) < error(untrained)

    cfg = re.search(r"```\n(# retrain\.cfg.*?)```", text, re.DOTALL)
    assert cfg is not None
    Path("retrain.cfg").write_text(cfg.group(1))
    amct.create_quant_retrain_config(
        "four.json", names["model"], names["example"], config_definition="retrain.cfg"
    )
    config = json.loads(Path("four.json").read_text())
    assert config["0"]["retrain_weight_config"]["dst_type"] == "INT8"
    assert config["5"]["retrain_enable"] is False
    table = text.split("## The config")[1].split("A short")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    named = {key for cell in cells for key in re.findall(r"`(\w+)`", cell)}
    written = Path("out/retrain.json").read_text()
    assert {key for key in named if f'"{key}"' not in written} == {
        "clip_max",
        "clip_min",
        "fixed_min",
    }


def test_the_commands_of_the_command_line_guide_run(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from amct_pytorch.cli.root import COMMANDS
    from amct_pytorch.cli.root import amct as command

    text = CLI_GUIDE.read_text()
    script = re.search(r"```sh\n(.*?)```", text, re.DOTALL)
    assert script is not None
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    torch.onnx.export(model, (torch.zeros(2, 3, 8, 8),), "net.onnx", dynamo=True, verbose=False)
    for name in ("samples.npy", "other.npy"):
        np.save(name, torch.randn(16, 3, 8, 8).numpy())
    for line in script.group(1).strip().splitlines():
        name, *words = line.split()
        assert name == "amct"
        result = CliRunner().invoke(command, words)
        assert result.exit_code == 0, (line, result.output)
    assert Path("answers").is_dir()
    assert Path("out/net_report.html").is_file()
    told = set(re.findall(r"^\| `amct (\w+)", text, re.MULTILINE))
    assert told == set(COMMANDS)


def test_the_options_that_the_command_line_guide_names_exist():
    from amct_pytorch.cli.root import COMMANDS
    from amct_pytorch.cli.root import amct as command

    known = {
        option
        for name in COMMANDS
        for parameter in command.get_command(None, name).params
        for option in parameter.opts
    }
    named = set(re.findall(r"--[a-z][a-z0-9-]+", CLI_GUIDE.read_text()))
    assert named - known <= {"--help", "--min-"}
