"""The subcommands from end to end on a small network: files, figures, exit statuses, errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image

import amct_pytorch
from amct_pytorch.cli.root import COMMANDS, amct


@pytest.fixture
def quantized(amct, network, samples):
    """The JSON document of a run of `amct quantize`."""
    result = amct("quantize", network, "--data", samples, "--out", "out/net", "--qdq", "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_quantize_writes_every_file_and_says_what_it_did(quantized, network, samples):
    assert set(quantized["files"]) == {
        "config", "deploy_model", "fake_quant_model", "ledger", "modified_model", "qdq_model",
        "record",
    }  # fmt: skip
    assert all(Path(file).is_file() for file in quantized["files"].values())
    assert quantized["layers"] == {"all": 3, "quantized": 3, "float": {}}
    assert quantized["data"] == {"samples": 12, "batch_size": 8, "batch_num": 2}
    assert quantized["agreement_with_onnxruntime_db"] > 100
    names = [
        layer["name"] for layer in json.loads(Path("out/net_ledger.json").read_text())["layers"]
    ]
    assert names == ["stem", "body", "head"]
    # The names and free batch of the float file stay, so that the new one can take its place.
    session = amct_pytorch.DeploySession("out/net_deploy_model.onnx")
    x = np.load(samples)[:5]
    (found,) = session.run(["logits"], {"image": x})
    (meant,) = ort.InferenceSession(str(network)).run(None, {"image": x})
    # Eight bits through three layers.
    assert np.linalg.norm(found - meant) < 0.05 * np.linalg.norm(meant)


def test_nothing_but_the_files_is_left(quantized):
    assert {p.name for p in Path("out").iterdir()} == {
        Path(file).name for file in quantized["files"].values()
    }


def test_compare_measures_what_the_files_do(amct, quantized, network, samples):
    words = ("compare", network, "out/net_deploy_model.onnx", "--data", samples)
    result = amct(*words, "--json", "--rounds", 2)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    (output,) = document["outputs"]
    x = np.load(samples)
    (meant,) = ort.InferenceSession(str(network)).run(None, {"image": x})
    (found,) = amct_pytorch.DeploySession("out/net_deploy_model.onnx").run(None, {"image": x})
    sqnr = 10 * np.log10((meant**2).sum() / ((meant - found) ** 2).sum())
    assert output["sqnr_db"] == pytest.approx(sqnr, abs=0.01)
    assert output["top1_agreement"] == (meant.argmax(1) == found.argmax(1)).mean()
    assert document["models"]["quant"]["kind"] == "deploy"
    assert document["models"]["quant"]["bytes"] < document["models"]["float"]["bytes"]
    assert document["speed_up"] > 0


@pytest.mark.parametrize(("goal", "status"), [("20", 0), ("90", 3)])
def test_a_goal_that_is_missed_is_exit_status_3(amct, quantized, network, samples, goal, status):
    words = ("compare", network, "out/net_deploy_model.onnx", "--data", samples, "--rounds", 0)
    result = amct(*words, "--min-sqnr", goal)
    assert result.exit_code == status
    assert ("goal missed: output 'logits': SQNR" in result.output) == (status == 3)


def test_a_model_is_equal_to_itself(amct, network, samples):
    result = amct("compare", network, network, "--data", samples, "--rounds", 0, "--json")
    assert json.loads(result.stdout)["outputs"][0]["exact"] is True
    assert json.loads(result.stdout)["outputs"][0]["sqnr_db"] is None


def test_run_writes_the_outputs_of_all_samples(amct, quantized, samples):
    result = amct("run", "out/net_deploy_model.onnx", "--data", samples, "--out", "results")
    assert result.exit_code == 0, result.output
    found = np.load("results/logits.npy")
    session = amct_pytorch.DeploySession("out/net_deploy_model.onnx")
    (meant,) = session.run(None, {"image": np.load(samples)})
    np.testing.assert_array_equal(found, meant)


def test_qdq_goes_beside_the_deploy_model(amct, quantized, samples):
    Path("out/net_qdq_model.onnx").unlink()
    result = amct("qdq", "out/net_deploy_model.onnx")
    assert result.exit_code == 0, result.output
    session = ort.InferenceSession("out/net_qdq_model.onnx")
    assert session.run(None, {"image": np.load(samples)})[0].shape == (12, 4)


def test_a_factory_is_quantized_like_a_file(amct, samples, tmp_path):
    Path("mynets.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))\n"
    )
    result = amct("quantize", "mynets:build", "--data", samples, "--json", "--skip", "3")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["layers"]["float"] == {"3": "the config says quant_enable false"}
    assert Path("build_int8/build_deploy_model.onnx").is_file()


def test_images_are_preprocessed_as_stated_and_the_statement_is_kept(amct, network):
    Path("photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        pixels = rng.integers(0, 256, (20, 30, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(f"photos/{i}.png")
    words = ("quantize", network, "--data", "photos", "--out", "out/net", "--json")
    result = amct(*words, "--mean", "127", "--std", "100,110,120", "--resize", "10")
    assert result.exit_code == 0, result.output
    stated = json.loads(result.stdout)["preprocessing"]["preprocessing"]
    assert (stated["size"], stated["std"], stated["resize"]) == ([8, 8], [100, 110, 120], 10)
    # The same from the file that was written.
    first = amct("run", network, "--data", "photos", "--out", "a", "--mean", "127", "--std",
                 "100,110,120", "--resize", "10")  # fmt: skip
    second = amct("run", network, "--data", "photos", "--out", "b", "--preprocessing",
                  "out/net_preprocessing.json")  # fmt: skip
    assert (first.exit_code, second.exit_code) == (0, 0)
    np.testing.assert_array_equal(np.load("a/logits.npy"), np.load("b/logits.npy"))


def test_images_without_a_stated_preprocessing_are_refused(amct, network):
    Path("photos").mkdir()
    Image.new("RGB", (9, 9)).save("photos/0.png")
    result = amct("quantize", network, "--data", "photos")
    assert result.exit_code == 1
    assert "give --mean and --std as in training" in result.output
    assert not list(Path().glob("*_int8"))


@pytest.mark.parametrize(
    ("mean", "std", "told"),
    [
        ("0.485,0.456,0.406", "0.25", "that is mean 123.675,116.28,103.53 and std 63.75"),
        ("-1", "1", "that is mean -255 and std 255"),
        ("0", "1", None),
        ("0", "255", None),
        ("1.5", "1", None),
    ],
)
def test_mean_and_std_of_another_range_of_pixels_are_doubted_once(
    amct, network, caplog, mean, std, told
):
    Path("photos").mkdir()
    for i in range(9):
        Image.new("RGB", (9, 9)).save(f"photos/{i}.png")
    result = amct("run", network, "--data", "photos", f"--mean={mean}", "--std", std)
    assert result.exit_code == 0, result.output
    doubts = [line for line in caplog.messages if "look like those of pixel values" in line]
    assert len(doubts) == (told is not None)
    assert told is None or told in doubts[0]


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float64", "float32"])
def test_integers_for_a_float_input_are_told_once(amct, network, caplog, dtype):
    Path("values").mkdir()
    for i in range(9):
        np.save(f"values/{i}.npy", np.ones((2, 3, 8, 8), dtype))
    assert amct("run", network, "--data", "values").exit_code == 0
    found = [line for line in caplog.messages if "taken as they are" in line]
    name = str(Path("values/0.npy"))
    told = f"--data: {name!r} holds {dtype} and input 'image' takes float32: the numbers are"
    assert len(found) == ("int" in dtype)
    assert all(line.startswith(told) for line in found)


NO_IMAGES = "only for images, and --data has npy files"
BAD = {
    "mean of arrays": (
        ["quantize", "N", "--data", "S", "--mean", "127.5", "--std", "127.5"], 1,
        f"error: --mean, --std: {NO_IMAGES}",
    ),
    "preprocessing of arrays": (
        ["run", "N", "--data", "S", "--preprocessing", "P"], 1,
        f"error: --preprocessing: {NO_IMAGES}",
    ),
    "crop of arrays": (
        ["compare", "N", "N", "--data", "S", "--crop", "center", "--resize", "9"], 1,
        f"error: --crop, --resize: {NO_IMAGES}",
    ),
    "no model": (["quantize", "none.onnx", "--data", "S"], 1, "there is no file 'none.onnx'"),
    "no data": (["quantize", "N", "--data", "nowhere"], 1, "no folder or file 'nowhere'"),
    "no such layer": (
        ["quantize", "N", "--data", "S", "--skip", "stemm"], 1,
        "--skip: stemm: the model has no such layer (did you mean 'stem'?)",
    ),
    "mean of the wrong length": (
        ["quantize", "N", "--data", "S", "--mean", "1,2", "--std", "1"], 1,
        "error: --mean has 2 numbers; allowed: 1, or 3",
    ),
    "size of part of a pixel": (
        ["quantize", "N", "--data", "S", "--size", "8.5"], 1,
        "--size is '8.5'; allowed: H or H,W, whole numbers",
    ),
    "size that is no number": (
        ["quantize", "N", "--data", "S", "--size", "nan"], 1,
        "--size is 'nan'; allowed: numbers separated by commas",
    ),
    "std that is no number": (
        ["quantize", "N", "--data", "S", "--mean", "1", "--std", "1,inf,1"], 1,
        "--std is '1,inf,1'; allowed: numbers separated by commas",
    ),
    "a file as a prefix": (
        ["quantize", "N", "--data", "S", "--out", "J"], 1,
        "--out is 'some.json', a file that exists; it must be a folder and a prefix",
    ),
    "unknown key of a config": (
        ["quantize", "N", "--data", "S", "--config", "J"], 1,
        "amct: error: --config: some.json: a: unknown key",
    ),
    "no such module": (["quantize", "nonets:build", "--data", "S"], 1, "cannot be imported"),
    "too many batches": (
        ["quantize", "N", "--data", "S", "--batch-num", "9"], 1, "the data has 2 batches of 8",
    ),
    "no such option": (["quantize", "N", "--dat", "S"], 2, "No such option"),
    "no data option": (["quantize", "N"], 2, "Missing option '--data'"),
    "no such command": (["quantise"], 2, "did you mean 'quantize'?"),
    "config and skip": (
        ["quantize", "N", "--data", "S", "--config", "c.json", "--skip", "stem"], 1,
        "--skip cannot go with --config",
    ),
    "unknown file": (["inspect", "S"], 1, "none of the files that amct knows"),
    "JSON as a model": (
        ["quantize", "J", "--data", "S"], 1, "MODEL: 'some.json' is JSON, not an ONNX model",
    ),
    "config as a model": (
        ["quantize", "C", "--data", "S"], 1,
        "error: MODEL: 'c.json' is a calibration config (create_quant_config), not an ONNX model",
    ),
    "record as a model": (
        ["compare", "N", "R", "--data", "S"], 1,
        "error: QUANT: 'record.txt' is a record of factors, not an ONNX model",
    ),
    "config as a deploy model": (
        ["qdq", "C"], 1,
        "error: DEPLOY: 'c.json' is a calibration config (create_quant_config), not a deploy model",
    ),
    "float model as a deploy model": (["qdq", "N"], 1, "no layer of the model is quantized"),
    "text as a model": (["run", "T", "--data", "S"], 1, "not a readable ONNX model: it is text"),
    "no ledger": (["report", "N"], 1, "net.onnx' is a float ONNX model, not a ledger"),
    "record as a ledger": (
        ["report", "R"], 1, "error: LEDGER: 'record.txt' is a record of factors, not a ledger",
    ),
    "text as a ledger": (["report", "T"], 1, "some.txt is no ledger: it is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_an_exit_status_and_no_file(amct, network, samples, case):
    words, status, text = BAD[case]
    Path("some.json").write_text('{"a": 1}')
    stated = {"size": [8, 8], "mean": [1], "std": [2]}
    Path("p.json").write_text(json.dumps({"preprocessing": stated}))
    Path("some.txt").write_text("hello")
    Path("record.txt").write_text('record { key: "a" value { scale_d: 1 } }')
    Path("c.json").write_text('{"activation_offset": true}')
    before = set(Path().rglob("*"))
    paths = {
        "N": network, "S": samples, "J": "some.json", "P": "p.json", "T": "some.txt",
        "R": "record.txt", "C": "c.json",
    }  # fmt: skip
    result = amct(*(paths.get(word, word) for word in words))
    assert result.exit_code == status
    assert text in result.output
    assert "Traceback" not in result.output
    if status == 1:
        lines = result.stderr.splitlines()
        errors = [line for line in lines if line.startswith("amct: error:")]
        assert errors == lines[-1:]
    # The log that flows keep is no result.
    assert {p for p in Path().rglob("*") if "amct_log" not in p.parts} == before


def test_errors_are_json_for_programs_and_a_traceback_on_request(amct, samples):
    result = amct("quantize", "none.onnx", "--data", samples, "--json")
    document = json.loads(result.stdout)
    assert (document["status"], document["error"]["type"]) == (1, "FileMissingError")
    shown = amct("quantize", "none.onnx", "--data", samples, "--traceback")
    assert "Traceback" in shown.output


def test_a_defect_is_told_from_a_users_error(amct, samples, monkeypatch):
    monkeypatch.setattr("amct_pytorch.cli.quantizing.float_model", lambda text: 1 / 0)
    result = amct("quantize", "net.onnx", "--data", samples)
    assert result.exit_code == 4
    assert "internal error: ZeroDivisionError" in result.output


def test_inspect_knows_every_file_of_a_run(amct, quantized, network):
    kinds = {
        "config": "calibration config",
        "deploy_model": "deploy model",
        "fake_quant_model": "fake-quant model",
        "ledger": "ledger",
        "modified_model": "modified model",
        "qdq_model": "QDQ model",
        "record": "record of factors",
    }
    for key, kind in kinds.items():
        document = json.loads(amct("inspect", quantized["files"][key], "--json").stdout)
        assert document["kind"].startswith(kind)
        if key in ("config", "deploy_model", "ledger", "record"):
            assert len(document["rows"]) == 3
    assert json.loads(amct("inspect", network, "--json").stdout)["kind"] == "float ONNX model"
    Path("q.cfg").write_text('batch_num : 2\nskip_layers : "stem"\n')
    result = amct("inspect", "q.cfg")
    assert "calibration .cfg" in result.output


def test_a_config_of_the_users_own_is_used(amct, quantized, network, samples):
    config = json.loads(Path("out/net_config.json").read_text())
    config["body"]["quant_enable"] = False
    Path("mine.json").write_text(json.dumps(config))
    Path("mine.cfg").write_text('skip_layers : "head"\n')
    for file, left in (("mine.json", "body"), ("mine.cfg", "head")):
        words = ("quantize", network, "--data", samples, "--config", file, "--json")
        document = json.loads(amct(*words, "--out", f"{left}/net").stdout)
        assert list(document["layers"]["float"]) == [left]


def test_doctor_tells_what_was_tried(amct):
    document = json.loads(amct("doctor", "--quick", "--json").stdout)
    assert document["versions"]["torch"]
    (clips, *_) = document["kernels"].values()
    assert clips.startswith(("clip", "exact"))
    assert any("QDQ files in ONNX Runtime" in text for text in document["advice"])


def test_help_is_there_for_all_and_needs_no_torch():
    script = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from amct_pytorch.cli.root import amct, COMMANDS\n"
        "for name in COMMANDS:\n"
        "    result = CliRunner().invoke(amct, [name, '--help'])\n"
        "    assert result.exit_code == 0 and '--json' in result.output, name\n"
        "assert CliRunner().invoke(amct, ['--help']).exit_code == 0\n"
        "assert not {'torch', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert sorted(COMMANDS) == amct.list_commands(None)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_call_back_into_amct(amct, shell):
    result = amct("completion", shell)
    assert result.exit_code == 0
    assert "_AMCT_COMPLETE" in result.output


def test_completion_completes(tmp_path):
    env = {**os.environ, "_AMCT_COMPLETE": "bash_complete", "COMP_WORDS": "amct qu",
           "COMP_CWORD": "1"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "amct_pytorch"], env=env, capture_output=True, text=True
    )
    assert done.stdout.split() == ["plain,quantize"]


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"]
)
def test_an_interrupted_run_leaves_nothing(network, samples, number, status):
    """The signal comes while the network is being looked at, when files are half-made."""
    words = ["quantize", str(network), "--data", str(samples), "--out", "out/net"]
    process = subprocess.Popen(
        [sys.executable, "-m", "amct_pytorch", *words],
        cwd=network.parent,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job, which the tests may be, ignores Ctrl-C, and so would its child.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("looking at the network"):
            break
    assert list(network.parent.glob(".amct-work-*"))
    process.send_signal(number)
    rest = process.stderr.read()
    assert process.wait(timeout=60) == status
    assert "amct: interrupted" in rest
    left = {p.name for p in network.parent.iterdir()} - {"amct_log"}
    assert left == {"net.onnx", "samples.npy"}


def test_what_a_killed_run_left_is_removed_by_the_next(amct, network, samples):
    process = subprocess.Popen(
        [sys.executable, "-m", "amct_pytorch", "quantize", str(network), "--data", str(samples),
         "--out", "out/net"],
        cwd=network.parent,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("looking at the network"):
            break
    process.kill()
    process.wait()
    process.stderr.close()
    assert list(Path().glob(".amct-work-*"))
    time.sleep(0.01)
    assert amct("quantize", network, "--data", samples, "--out", "out/net").exit_code == 0
    assert not list(Path().glob(".amct-work-*"))
