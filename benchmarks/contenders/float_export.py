"""The export alone: the float network to ONNX, which every tool that works on ONNX needs first."""

import torch
from contract import Job
from real_models import efficientnet_lite0


def main() -> None:
    job = Job()
    torch.set_num_threads(1)
    model = efficientnet_lite0()
    image = torch.from_numpy(job.calibration_batches()[0])
    with job.call():
        torch.onnx.export(
            model,
            (image,),
            job.float_onnx,
            dynamo=True,
            opset_version=18,
            input_names=["input"],
            output_names=["output"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )
    job.finish(["torch", "onnx", "onnxscript"])


if __name__ == "__main__":
    main()
