"""Distillation configs: what is written, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distilled import images, mixed, student_of

import amct_pytorch as amct
from amct_pytorch.errors import ArgumentTypeError, ArgumentValueError, ConfigError, ModelError


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_default_config(tmp_path: Path) -> None:
    config = tmp_path / "c.json"
    amct.create_distill_config(config, mixed(), images()[0])
    document = json.loads(config.read_text())
    assert list(document)[:5] == [
        "version",
        "batch_num",
        "group_size",
        "data_dump",
        "distill_group",
    ]
    assert document["distill_group"] == [["stem.0"], ["first"], ["second"], ["up"], ["head"]]
    assert document["first"] == {
        "quant_enable": True,
        "distill_data_config": {"algo": "ulq_quantize", "dst_type": "INT8"},
        "distill_weight_config": {
            "algo": "arq_distill",
            "channel_wise": True,
            "dst_type": "INT8",
        },
    }
    assert document["head"]["distill_weight_config"]["channel_wise"] is False


def test_overrides_and_skips_of_a_cfg(tmp_path: Path) -> None:
    cfg = """
    batch_num: 2
    distill_weight_quant_config { ulq_distill { dst_type: INT4 } }
    distill_override_layer_types { layer_type: "Linear"
      distill_weight_quant_config { arq_distill { } } }
    distill_override_layers { layer_name: "first"
      distill_data_quant_config { ulq_quantize {
        clip_max_min { clip_max: 3.5 clip_min: -1.25 } dst_type: INT4 } } }
    quant_skip_layer_types: "ConvTranspose2d"
    """
    _, config = student_of(mixed(), tmp_path, cfg)
    document = json.loads(config.read_text())
    assert document["batch_num"] == 2
    assert document["up"]["quant_enable"] is False
    assert ["up"] in document["distill_group"]
    assert document["head"]["distill_weight_config"]["algo"] == "arq_distill"
    assert document["second"]["distill_weight_config"]["algo"] == "ulq_distill"
    assert document["first"]["distill_data_config"] == {
        "algo": "ulq_quantize",
        "dst_type": "INT4",
        "clip_max": 3.5,
        "clip_min": -1.25,
    }


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        ("group_size: 0", "group_size is 0; allowed: an integer >= 1"),
        ('quant_skip_layers: "frist"', "did you mean 'first'"),
        (
            'distill_group { start_layer_name: "stem.0" end_layer_name: "secnd" }',
            "did you mean 'second'",
        ),
        (
            'distill_group { start_layer_name: "second" end_layer_name: "first" }',
            "does not run on what 'second' makes",
        ),
        (
            'distill_group { start_layer_name: "second" end_layer_name: "up" }',
            "2 tensors go into it",
        ),
        (
            'distill_group { start_layer_name: "first" end_layer_name: "second" }'
            'distill_group { start_layer_name: "second" end_layer_name: "second" }',
            "second stands in the groups more than once",
        ),
        ("group_sise: 2", "did you mean 'group_size'"),
    ],
)
def test_bad_definitions(tmp_path: Path, cfg: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        student_of(mixed(), tmp_path, cfg)
    assert not (tmp_path / "distill.json").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"distill_group": [["first", "frist"]]}, "did you mean 'first'"),
        ({"distill_group": [["second", "first"]]}, r"distill_group\[0\]"),
        ({"distill_group": [["first"], ["first"]]}, "more than once"),
        ({"distill_group": [[]]}, "is empty"),
        ({"data_dump": 1}, "data_dump is 1; allowed: true or false"),
        ({"first": {"distill_data_config": {"dst_type": "INT16"}}}, "INT16"),
        ({"head": {"distill_weight_config": {"channel_wise": True}}}, "one scale for all"),
        ({"frist": {}}, "did you mean 'first'"),
    ],
)
def test_bad_configs(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    model = mixed()
    _, config = student_of(model, tmp_path)
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(ConfigError, match=words):
        amct.create_distill_model(config, model, images()[0])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"epochs": -1}, ArgumentValueError, "epochs is -1; allowed: an integer >= 0"),
        ({"epochs": 1.5}, ArgumentTypeError, "epochs is 1.5"),
        ({"lr": 0}, ArgumentValueError, "lr is 0; allowed: a number > 0"),
        ({"loss": 3}, ArgumentTypeError, "loss is a int"),
        ({"optimizer": 3}, ArgumentTypeError, "optimizer is a int"),
        ({"train_loader": []}, amct.AmctError, "yields no batch"),
        ({"train_loader": ["text"]}, ArgumentTypeError, "batch 1 of train_loader"),
        ({"compress_model": mixed()}, ModelError, "no quantized layer"),
        ({"epoch": 2}, ArgumentTypeError, "did you mean 'epochs'"),
    ],
)
def test_bad_calls(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = mixed()
    student, config = student_of(model, tmp_path)
    given = {
        "model": model,
        "compress_model": student,
        "config_file": config,
        "train_loader": images(),
    }
    with pytest.raises(error, match=words):
        amct.distill(**{**given, **change})


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    model = mixed()
    student, config = student_of(model, tmp_path)
    with pytest.raises(amct.AmctError, match=r"the loss of block 'stem.0'.*is nan"):
        amct.distill(model, student, config, images(), loss=lambda a, b: (a - b).sum() * torch.nan)


@pytest.mark.parametrize(
    "script",
    [
        "import amct_pytorch as a; a.distill; import amct_pytorch.distill.distill_sample as d;"
        "d.DistillSampleBase; assert callable(a.distill)",
        "from amct_pytorch.distill.distill_sample import DistillSampleBase as D;"
        "import amct_pytorch as a; assert callable(a.distill);"
        "assert a.distill.distill_sample.DistillSampleBase is D",
        "from amct_pytorch import distill; assert callable(distill); distill.DistillSampleBase",
    ],
)
def test_the_function_and_the_package_are_one(script: str) -> None:
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_student_that_was_not_distilled_is_not_saved(tmp_path: Path) -> None:
    student, _ = student_of(mixed(), tmp_path)
    with pytest.raises(amct.AmctError, match=r"'stem\.0'.*call distill"):
        amct.save_distill_model(student, tmp_path / "net", images()[0])
    assert not list(tmp_path.glob("net*"))
