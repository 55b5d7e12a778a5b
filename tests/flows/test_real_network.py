"""The main job on a real network: EfficientNet-Lite0 and photos, held-out from calibrated."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from fidelity import Fidelity, compare
from ort_sessions import cpu_session
from photo_crops import PhotoCrops
from torch import nn

import amct_pytorch as amct


@dataclass
class Run:
    """One run of the main job with default settings.

    Attributes:
        folder: holds ``m.onnx``, ``record.txt`` and the files at ``out/lite0_*``.
        calibration: the calibration model after its last batch.
        float_logits: of the held-out crops.
    """

    folder: Path
    calibration: nn.Module
    float_logits: np.ndarray


@pytest.fixture(scope="module")
def run(
    efficientnet_lite0: nn.Module,
    photo_crops: PhotoCrops,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("lite0")
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.chdir(folder)
        first = photo_crops.calibration[:1]
        amct.create_quant_config("config.json", efficientnet_lite0, first, batch_num=4)
        calibration = amct.quantize_model(
            "config.json", "m.onnx", "record.txt", efficientnet_lite0, first
        )
        for batch in photo_crops.calibration.split(8):
            calibration(batch)
        # From the two files alone, by a process that knows nothing of the model.
        code = "import amct_pytorch as a; a.save_model('m.onnx', 'record.txt', 'out/lite0')"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=folder)
        amct.deploy_to_qdq("out/lite0_deploy_model.onnx", "out/lite0_qdq_model.onnx")
        logits = torch.cat([efficientnet_lite0(x) for x in photo_crops.heldout.split(8)])
        yield Run(folder, calibration, logits.numpy())


def logits_of(
    session: ort.InferenceSession | amct.DeploySession, images: torch.Tensor
) -> np.ndarray:
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: x[None].numpy()})[0] for x in images])


def fidelity(run: Run, crops: PhotoCrops, file: str) -> Fidelity:
    session = cpu_session(str(run.folder / "out" / file))
    return compare(run.float_logits, logits_of(session, crops.heldout), crops.labels.numpy())


def test_every_layer_is_quantized_under_its_module_name(
    run: Run, efficientnet_lite0: nn.Module
) -> None:
    names = [
        name
        for name, module in efficientnet_lite0.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    ledger = json.loads((run.folder / "out/lite0_ledger.json").read_text())
    assert [e["name"] for e in ledger["layers"] if e["status"] == "quantized"] == names
    assert len(names) == 50
    # Nothing is left of the convolutions' own padding, nor of the BatchNorms.
    deploy = onnx.load(run.folder / "out/lite0_deploy_model.onnx")
    types = {node.op_type for node in deploy.graph.node}
    assert not types & {"Pad", "BatchNormalization"}


def test_accuracy_on_held_out_photos(run: Run, photo_crops: PhotoCrops) -> None:
    found = fidelity(run, photo_crops, "lite0_fake_quant_model.onnx")
    # The goal is 23 dB and 96 % on the demo's 192 crops; on these 48 the figures were 23.6 dB
    # and 98 %. One crop of 48 is 2 points of agreement.
    assert found.sqnr_db >= 23.0
    assert found.agreement >= 0.95


def test_simulation_in_torch_is_the_fake_quant_model(run: Run, photo_crops: PhotoCrops) -> None:
    session = cpu_session(str(run.folder / "out/lite0_fake_quant_model.onnx"))
    images = photo_crops.heldout[:8]
    with torch.inference_mode():
        simulated = run.calibration(images).numpy()
    found = compare(logits_of(session, images), simulated, photo_crops.labels[:8].numpy())
    # Only float operators between layers (additions, pooling) may round differently.
    assert found.sqnr_db >= 45


def test_deploy_model_is_the_fake_quant_model(run: Run, photo_crops: PhotoCrops) -> None:
    images = photo_crops.heldout[:4]
    fake = logits_of(cpu_session(str(run.folder / "out/lite0_fake_quant_model.onnx")), images)
    deploy = logits_of(amct.DeploySession(run.folder / "out/lite0_deploy_model.onnx"), images)
    found = compare(fake, deploy, photo_crops.labels[:4].numpy())
    assert found.sqnr_db >= 45


def test_every_layers_integers_are_those_of_the_fake_quant_model(
    run: Run, photo_crops: PhotoCrops
) -> None:
    deploy = amct.DeploySession(run.folder / "out/lite0_deploy_model.onnx")
    sums = [sums for _, sums in deploy.layers.values()]
    rounded = [f"{layer}.round.output0" for layer in deploy.layers]
    fake = onnx.load(run.folder / "out/lite0_fake_quant_model.onnx")
    fake.graph.output.extend(onnx.ValueInfoProto(name=name) for name in rounded)
    session = ort.InferenceSession(fake.SerializeToString())
    feeds = {deploy.get_inputs()[0].name: photo_crops.heldout[:1].numpy()}
    integers = dict(zip(deploy.layers, deploy.run(sums, feeds), strict=True))
    floats = dict(zip(deploy.layers, session.run(rounded, feeds), strict=True))
    assert len(integers) == 50
    different = [name for name in integers if not np.array_equal(integers[name], floats[name])]
    assert different == []


def test_qdq_model_is_as_near_to_float(run: Run, photo_crops: PhotoCrops) -> None:
    fake = fidelity(run, photo_crops, "lite0_fake_quant_model.onnx")
    qdq = fidelity(run, photo_crops, "lite0_qdq_model.onnx")
    assert qdq.sqnr_db >= fake.sqnr_db - 0.5


def test_record_and_ledger_belong_together(run: Run) -> None:
    ledger = json.loads((run.folder / "out/lite0_ledger.json").read_text())
    assert ledger["notes"] == []
    assert ledger["output"]["sqnr_db"] > 20
    assert all(e["sqnr_db"] > 15 for e in ledger["layers"])
    sizes = ledger["bytes"]
    # Weights and biases make up almost all of the file: a quarter, and the graph.
    assert sizes["deploy"] < 0.28 * sizes["float"]
