"""Ours: create_quant_config, quantize_model, the forward passes, save_model, deploy_to_qdq."""

import json
from pathlib import Path

import logits
import torch
from contract import Job, arguments
from real_models import efficientnet_lite0

import amct_pytorch as amct


def ask_for_ada(config: str, iterations: int) -> None:
    """ADA for all layers of a config."""
    document = json.loads(Path(config).read_text())
    for layer in document.values():
        if isinstance(layer, dict):
            learned = {"wts_algo": "ada_quantize", "num_iteration": iterations}
            layer["weight_quant_params"] |= learned
    Path(config).write_text(json.dumps(document))


def main() -> None:
    parser = arguments()
    parser.add_argument("--ada", type=int, help="round by ADA, with so many steps of learning")
    given = parser.parse_args()
    job = Job(given)
    torch.set_num_threads(1)
    model = efficientnet_lite0()
    batches = [torch.from_numpy(batch) for batch in job.calibration_batches()]
    config, record = str(job.folder / "config.json"), str(job.folder / "record.txt")
    modified, saved = str(job.folder / "modified.onnx"), job.folder / "lite0"
    files = {
        "fake_quant": job.folder / "lite0_fake_quant_model.onnx",
        "deploy": job.folder / "lite0_deploy_model.onnx",
        "qdq": job.folder / "lite0_qdq_model.onnx",
    }
    with job.call():
        with job.phase("create_quant_config"):
            amct.create_quant_config(config, model, batches[0], batch_num=len(batches))
        if given.ada is not None:
            ask_for_ada(config, given.ada)
        with job.phase("quantize_model"):
            calibrated = amct.quantize_model(
                config,
                modified,
                record,
                model,
                batches[0],
                input_names=["input"],
                output_names=["output"],
                dynamic_axes={"input": {0: "batch"}, "output": {0: "batch"}},
            )
        with job.phase("calibrate"), torch.no_grad():
            for batch in batches:
                calibrated(batch)
        with job.phase("save_model"):
            amct.save_model(modified, record, str(saved))
        with job.phase("deploy_to_qdq"):
            amct.deploy_to_qdq(str(files["deploy"]), str(files["qdq"]))
    ways = {
        "simulated": logits.of_module(calibrated),
        "fake_quant": logits.of_onnx(files["fake_quant"]),
        "deploy": logits.of_deploy(files["deploy"]),
        "qdq": logits.of_onnx(files["qdq"]),
    }
    job.finish(["amct-pytorch", "torch", "onnx", "onnxscript", "onnxruntime"], ways, files)


if __name__ == "__main__":
    main()
