"""NVIDIA ModelOpt's quantizer for ONNX files: int8, max calibration."""

import logits
import numpy as np
from contract import Job
from modelopt.onnx.quantization import quantize


def main() -> None:
    job = Job()
    quantized = job.folder / "int8.onnx"
    batches = job.calibration_batches()
    with job.call():
        quantize(
            str(job.float_onnx),
            quantize_mode="int8",
            calibration_data={"input": np.concatenate(batches)},
            calibration_method="max",
            calibration_eps=["cpu"],
            calibration_shapes=f"input:{'x'.join(str(n) for n in batches[0].shape)}",
            high_precision_dtype="fp32",
            output_path=str(quantized),
        )
    job.finish(
        ["nvidia-modelopt", "onnxruntime", "onnx"],
        {"qdq": logits.of_onnx(quantized)},
        {"qdq": quantized},
    )


if __name__ == "__main__":
    main()
