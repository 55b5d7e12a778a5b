"""Quantization-aware training of a whole model: what is told of bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flows.retraining_case import created, data, network, saved, train
from torch import nn

import amct_pytorch as amct
from amct_pytorch.errors import (
    AmctError,
    ArgumentTypeError,
    ArgumentValueError,
    CalibrationError,
    ConfigError,
    FileMissingError,
    ModelError,
)


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)


def test_files_are_not_begun_where_the_model_is_not_ready() -> None:
    batches = data(3)
    trained = created(network(), batches[0], batch_num=3)
    train(trained, batches[:2])
    told = "'0', '3', '8' are not known: 2 of batch_num 3 training batches have run through '0'"
    with pytest.raises(CalibrationError, match=told):
        saved(trained, batches[0])
    assert not Path("out").exists()


def wrong_checkpoint(change: Callable[[dict[str, Any]], Any]) -> None:
    """Restores from a checkpoint that something is wrong with."""
    model, (batch, *_) = network(), data(1)
    trained = created(model, batch)
    torch.save(change(trained.state_dict()), "checkpoint.pth")
    Path("record.txt").unlink()
    try:
        amct.restore_quant_retrain_model(
            "retrain.json", model, "record.txt", batch, save_pth_path="checkpoint.pth"
        )
    finally:
        assert not Path("record.txt").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda state: {k: v for k, v in state.items() if "clip_max" not in k},
            "it lacks '0.input_quantizer.clip_max' and 2 more",
        ),
        (
            lambda state: {k.replace("8.layer", "9.layer"): v for k, v in state.items()},
            "it lacks '8.layer.weight' and 1 more; it has '9.layer.weight' and 1 more, which",
        ),
        (lambda _: network().state_dict(), "it lacks '0.layer.weight' and .* it has '0.weight'"),
        (
            lambda state: {**state, "8.layer.bias": torch.zeros(4)},
            r"'8.layer.bias' has shape \[4\] in it and \[5\] in the model",
        ),
        (lambda state: {"net": state, "epoch": 3}, "holds several things .*'net' perhaps"),
        (lambda state: [state], "it is a list; allowed: a state dict"),
        (lambda _: network(), "cannot be read as data only"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_told(
    change: Callable[[dict[str, Any]], Any], told: str
) -> None:
    with pytest.raises(ModelError, match=told):
        wrong_checkpoint(change)


def test_no_checkpoint_is_told() -> None:
    model, (batch, *_) = network(), data(1)
    trained = created(model, batch)
    arguments = ("retrain.json", model, "record.txt", batch)
    with pytest.raises(FileMissingError, match=r"there is no file 'no\.pth'"):
        amct.restore_quant_retrain_model(*arguments, "no.pth")
    Path("text.pth").write_text("text")
    with pytest.raises(ModelError, match=r"text\.pth"):
        amct.restore_quant_retrain_model(*arguments, "text.pth")
    torch.save({"state": trained.state_dict()}, "named.pth")
    with pytest.raises(ArgumentValueError, match=r"'stat', which .*did you mean 'state'"):
        amct.restore_quant_retrain_model(*arguments, "named.pth", "stat")
    with pytest.raises(ArgumentTypeError, match="state_dict_name is 3"):
        amct.restore_quant_retrain_model(*arguments, "named.pth", 3)


def test_data_parallel_is_refused() -> None:
    model, (batch, *_) = network(), data(1)
    trained = created(model, batch)
    with pytest.raises(ModelError, match="wrapped in DataParallel"):
        amct.create_quant_retrain_model("retrain.json", nn.DataParallel(model), "record.txt", batch)
    with pytest.raises(ModelError, match=r"DataParallel cannot do.*DistributedDataParallel"):
        # What DataParallel does for each of several devices.
        [module._replicate_for_data_parallel() for module in trained.modules()]


@pytest.mark.parametrize(
    ("call", "told", "error"),
    [
        (
            lambda m, b: amct.create_quant_retrain_config("c.json", m, b, config_definition="x"),
            "config_defination: there is no file 'x'",
            FileMissingError,
        ),
        (
            lambda m, b: amct.create_quant_retrain_config("c.json", nn.ReLU(), b),
            "no layer that can be trained",
            ModelError,
        ),
        (
            lambda m, b: amct.create_quant_retrain_model("retrain.json", m, "retrain.json", b),
            "are the same file",
            ArgumentValueError,
        ),
        (
            lambda m, b: amct.create_quant_retrain_model("retrain.json", m[:3], "r.txt", b),
            "3: the model has no such layer",
            ConfigError,
        ),
        (
            lambda m, b: amct.save_quant_retrain_model("retrain.json", m, "r.txt", "o", b),
            "no layer that is trained with its quantization",
            ModelError,
        ),
        (
            lambda m, b: amct.restore_quant_retrain_model("retrain.json", m, "r.txt", b),
            "missing a required argument: 'pth_file'",
            ArgumentTypeError,
        ),
    ],
)
def test_bad_input_is_told(
    call: Callable[[nn.Module, Any], object], told: str, error: type[AmctError]
) -> None:
    model, (batch, *_) = network(), data(1)
    created(model, batch)
    before = sorted(Path().rglob("*.*"))
    with pytest.raises(error, match=told):
        call(model, batch)
    assert sorted(Path().rglob("*.*")) == before


def test_a_model_that_is_in_training_already_is_told() -> None:
    (batch, *_) = data(1)
    trained = created(network(), batch)
    with pytest.raises(ModelError, match="in quantization-aware training already"):
        amct.create_quant_retrain_model("retrain.json", trained, "record.txt", batch)
    with pytest.raises(ModelError, match="in quantization-aware training already"):
        amct.create_quant_retrain_config("other.json", trained, batch)


def test_a_config_of_other_layers_than_were_trained_is_told() -> None:
    batches = data(2)
    trained = created(network(), batches[0])
    train(trained, batches)
    config = json.loads(Path("retrain.json").read_text())
    config["3"]["retrain_enable"] = False
    Path("retrain.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="does not enable layer '3', which is quantized"):
        saved(trained, batches[0])
