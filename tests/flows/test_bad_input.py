"""Wrong input: the error names place, value, allowed and nearest, and nothing is written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from topologies.networks import Chain, Residual
from torch import Tensor, nn

import amct_pytorch as amct
from amct_pytorch.errors import (
    AmctError,
    ArgumentTypeError,
    ArgumentValueError,
    CalibrationError,
    ConfigError,
    ExportError,
    FileAccessError,
    FileMissingError,
    ModelError,
    RecordError,
)

X = torch.randn(2, 3, 16, 16)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files() -> set[str]:
    """Every file below the working directory but the log."""
    return {str(p) for p in Path().rglob("*") if p.is_file() and p.parts[0] != "amct_log"}


def edited_config(model: nn.Module, edit: Callable[[dict[str, Any]], object]) -> None:
    amct.create_quant_config("config.json", model, X)
    config = json.loads(Path("config.json").read_text())
    edit(config)
    Path("config.json").write_text(json.dumps(config))


def quantized(model: nn.Module, batch_num: int = 1) -> nn.Module:
    amct.create_quant_config("config.json", model, X, batch_num=batch_num)
    return amct.quantize_model("config.json", "m.onnx", "record.txt", model, X)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"model": "net"}, ArgumentTypeError, ["model", "str", "torch.nn.Module"]),
        ({"input_data": 3}, ArgumentTypeError, ["input_data", "int", "tuple"]),
        ({"input_data": ()}, ArgumentTypeError, ["input_data", "no tensor"]),
        ({"config_file": 5}, ArgumentTypeError, ["config_file", "int"]),
        ({"config_file": ""}, ArgumentValueError, ["config_file"]),
        ({"batch_num": 0}, ArgumentValueError, ["batch_num", "0", ">= 1"]),
        ({"batch_num": True}, ArgumentTypeError, ["batch_num", "true"]),
        ({"activation_offset": 1}, ArgumentTypeError, ["activation_offset", "1"]),
        ({"skip_layers": ["hed"]}, ArgumentValueError, ["hed", "'head'"]),
        ({"skip_layer": ["head"]}, ArgumentTypeError, ["skip_layer", "skip_layers"]),
        ({"config_defination": "no.cfg"}, FileMissingError, ["no.cfg"]),
        ({"input_data": torch.randn(2, 5, 16, 16)}, ModelError, ["body.0.0", "input_data"]),
    ],
)
def test_create_quant_config(
    arguments: dict[str, Any], error: type[AmctError], words: list[str]
) -> None:
    given: dict[str, Any] = {"config_file": "config.json", "model": Chain().eval(), "input_data": X}
    with pytest.raises(error) as caught:
        amct.create_quant_config(**(given | arguments))
    for word in words:
        assert word in str(caught.value)
    assert not files()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda c: c.update(batch_nun=2), ["batch_nun", "batch_num"]),
        (lambda c: c.update(batch_num=-1), ["batch_num", "-1", ">= 1"]),
        (lambda c: c.update(haed=c["head"]), ["haed", "'head'"]),
        (lambda c: c.update(skip_fusion_layers=["boddy"]), ["boddy", "body"]),
        (
            lambda c: c["head"]["activation_quant_params"].update(search_step=9),
            ["head.activation_quant_params.search_step", "9"],
        ),
        (
            lambda c: c["head"]["activation_quant_params"].update(max_percentil=0.9),
            ["max_percentil", "max_percentile"],
        ),
        (
            lambda c: c["head"]["weight_quant_params"].update(channel_wise=True),
            ["head.weight_quant_params.channel_wise", "Linear"],
        ),
        (
            lambda c: [v.update(quant_enable=False) for v in c.values() if isinstance(v, dict)],
            ["no layer is enabled", "quant_enable"],
        ),
    ],
)
def test_config_file(edit: Callable[[dict[str, Any]], object], words: list[str]) -> None:
    model = Chain().eval()
    edited_config(model, edit)
    before = files()
    with pytest.raises(ConfigError) as caught:
        amct.quantize_model("config.json", "m.onnx", "record.txt", model, X)
    for word in ["config.json", *words]:
        assert word in str(caught.value)
    assert files() == before


def test_cfg_syntax_error_names_line_and_field() -> None:
    Path("a.cfg").write_text("batch_num: 2\ncommon_config {\n  arq_quantise {}\n}\n")
    with pytest.raises(ConfigError, match=r"a\.cfg.*3.*arq_quantise.*arq_quantize") as caught:
        amct.create_quant_config("config.json", Chain().eval(), X, config_defination="a.cfg")
    assert isinstance(caught.value, ValueError)
    assert not files() - {"a.cfg"}


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"config_file": "absent.json"}, FileMissingError, ["config_file", "absent.json"]),
        ({"input_names": "x"}, ArgumentTypeError, ["input_names", "'x'"]),
        ({"input_names": ["x", "y"]}, ArgumentValueError, ["input_names", "2 names", "1 tensor"]),
        (
            {"input_names": ["image"], "dynamic_axes": {"imagee": [0]}},
            ArgumentValueError,
            ["imagee", "'image'"],
        ),
        (
            {"input_names": ["image"], "dynamic_axes": {"image": [-1]}},
            ArgumentValueError,
            ["image", "-1", ">= 0"],
        ),
        ({"modified_onnx_file": "b.onnx"}, ArgumentTypeError, ["modfied_onnx_file", "twice"]),
        ({"record_file": "config.json"}, ArgumentValueError, ["record_file", "config_file"]),
        ({"record_file": "./m.onnx"}, ArgumentValueError, ["record_file", "modfied_onnx_file"]),
        ({"input_names": [""]}, ArgumentValueError, ["input_names", "empty"]),
        ({"input_names": ["head.bias"]}, ArgumentValueError, ["head.bias", "weight"]),
        (
            {"input_names": ["x"], "output_names": ["x"]},
            ArgumentValueError,
            ["output_names", "'x'", "input_names"],
        ),
        ({"output_names": ["a", "b"]}, ArgumentValueError, ["output_names", "2 names", "1 tensor"]),
        (
            {"input_names": ["image"], "dynamic_axes": {"image": {7: "n"}}},
            ArgumentValueError,
            ["image", "7", "0 to 3"],
        ),
        (
            {"input_names": ["image"], "dynamic_axes": {"image": {0: 5}}},
            ArgumentTypeError,
            ["image", "5", "label"],
        ),
        ({"model": nn.DataParallel(Chain())}, ModelError, ["DataParallel", "model.module"]),
        (
            {"model": torch.compile(Chain(), backend="eager")},
            ModelError,
            ["OptimizedModule", "model._orig_mod"],
        ),
    ],
)
def test_quantize_model(
    arguments: dict[str, Any], error: type[AmctError], words: list[str]
) -> None:
    model = Chain().eval()
    amct.create_quant_config("config.json", model, X)
    given: dict[str, Any] = {
        "config_file": "config.json",
        "modfied_onnx_file": "m.onnx",
        "record_file": "record.txt",
        "model": model,
        "input_data": X,
    }
    with pytest.raises(error) as caught:
        amct.quantize_model(**(given | arguments))
    for word in words:
        assert word in str(caught.value)
    assert files() == {"config.json"}


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write into any folder")
def test_read_only_folder() -> None:
    Path("locked").mkdir(mode=0o500)
    with pytest.raises(FileAccessError, match="locked"):
        amct.create_quant_config("locked/config.json", Chain().eval(), X)


def test_path_below_a_file() -> None:
    Path("taken").write_text("")
    with pytest.raises(FileAccessError, match=r"config_file.*taken"):
        amct.create_quant_config("taken/config.json", Chain().eval(), X)
    assert files() == {"taken"}


def test_nan_in_weights_names_the_layer() -> None:
    model = Chain().eval()
    amct.create_quant_config("config.json", model, X)
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"weight of layer 'head'.*1 value"):
        amct.quantize_model("config.json", "m.onnx", "record.txt", model, X)
    assert files() == {"config.json"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_calibration_data_names_layer_and_batch(value: float) -> None:
    model = Chain().eval()
    calibration = quantized(model, batch_num=2)
    calibration(X)
    bad = X.clone()
    bad[0, 0, 0, 0] = value
    before = Path("record.txt").read_text()
    with pytest.raises(CalibrationError, match=r"layer 'body\.0\.0'.*batch 2"):
        calibration(bad)
    with pytest.raises(CalibrationError, match="call quantize_model again"):
        calibration(X)
    assert Path("record.txt").read_text() == before


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((torch.randn(2, 5, 16, 16),), ["module 'body.0.0'", "float32 [2, 5, 16, 16]"]),
        ((X.double(),), ["module 'body.0.0'", "float64 [2, 3, 16, 16]"]),
        ((X, None), ["TypeError", "float32 [2, 3, 16, 16], None"]),
        ((), ["TypeError", "The batch is nothing"]),
    ],
    ids=["channels", "type", "too many", "none"],
)
def test_a_batch_that_the_model_cannot_run(batch: tuple[Any, ...], words: list[str]) -> None:
    model = Chain().eval()
    calibration = quantized(model, batch_num=2)
    calibration(X)
    before = Path("record.txt").read_text()
    with pytest.raises(CalibrationError) as caught:
        calibration(*batch)
    for word in ["batch 2", "input_data was float32 [2, 3, 16, 16]", *words]:
        assert word in str(caught.value)
    assert "amct_pytorch" not in str(caught.value)
    assert isinstance(caught.value.__cause__, (RuntimeError, TypeError))
    assert not isinstance(caught.value.__cause__, CalibrationError)
    assert Path("record.txt").read_text() == before


def test_after_calibration_the_model_raises_its_own_errors() -> None:
    calibration = quantized(Chain().eval())
    calibration(X)
    assert "forward" not in vars(calibration)
    with pytest.raises(RuntimeError) as caught:
        calibration(torch.randn(2, 5, 16, 16))
    assert not isinstance(caught.value, CalibrationError)


def test_too_few_batches() -> None:
    model = Residual().eval()
    quantized(model, batch_num=2)(X)
    before = files()
    with pytest.raises(RecordError, match=r"'stem\.0'.*batch_num batches first"):
        amct.save_model("m.onnx", "record.txt", "out/net")
    assert files() == before


def test_record_of_another_model() -> None:
    quantized(Residual().eval())(X)
    Path("record.txt").rename("other.txt")
    quantized(Chain().eval())(X)
    with pytest.raises(RecordError, match=r"stem\.0"):
        amct.save_model("m.onnx", "other.txt", "out/net")
    assert not Path("out").exists()


def test_record_that_lost_a_layer() -> None:
    quantized(Residual().eval())(X)
    text = Path("record.txt").read_text()
    Path("record.txt").write_text(text[: text.index('record {\n  key: "b.0"')])
    with pytest.raises(RecordError, match=r"record\.txt.*'b\.0'.*'head'"):
        amct.save_model("m.onnx", "record.txt", "out/net")
    assert not Path("out").exists()


def test_qdq_of_a_file_that_is_no_deploy_model() -> None:
    quantized(Chain().eval())(X)
    amct.save_model("m.onnx", "record.txt", "out/net")
    for name in ("m.onnx", "out/net_fake_quant_model.onnx"):
        with pytest.raises(ExportError, match="no layer of the model is quantized"):
            amct.deploy_to_qdq(name, "out/net_qdq_model.onnx")
    with pytest.raises(ArgumentValueError, match="same file"):
        amct.deploy_to_qdq("out/net_deploy_model.onnx", "out/net_deploy_model.onnx")
    assert not Path("out/net_qdq_model.onnx").exists()


@pytest.mark.parametrize("name", ["m.onnx", "record.txt"])
def test_save_model_with_a_missing_file(name: str) -> None:
    quantized(Chain().eval())(X)
    Path(name).unlink()
    with pytest.raises(FileMissingError, match=name):
        amct.save_model("m.onnx", "record.txt", "out/net")
    assert not Path("out").exists()


@pytest.mark.parametrize("content", [b"", b"not an onnx file", b"\x08\x0a\x12\x04"])
def test_save_model_with_a_broken_onnx_file(content: bytes) -> None:
    quantized(Chain().eval())(X)
    Path("m.onnx").write_bytes(content)
    with pytest.raises(AmctError, match=r"m\.onnx|amct"):
        amct.save_model("m.onnx", "record.txt", "out/net")
    assert not Path("out").exists()


class Inexportable(nn.Module):
    """Branches on the values of its input, which a graph cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y * 2 if float(y.sum()) > 0 else y


def test_model_that_cannot_be_exported() -> None:
    model = Inexportable().eval()
    amct.create_quant_config("config.json", model, X)
    with pytest.raises(ExportError, match=r"cannot be exported.*depends on the values"):
        amct.quantize_model("config.json", "m.onnx", "record.txt", model, X)
    assert files() == {"config.json"}


def test_model_without_layers() -> None:
    with pytest.raises(ModelError, match=r"no layer that can be quantized.*Conv2d"):
        amct.create_quant_config("config.json", nn.Sequential(nn.ReLU()), X)
    assert not files()
