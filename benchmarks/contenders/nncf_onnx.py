"""NNCF's post-training quantization of the ONNX file, its defaults."""

import logits
import nncf
import onnx
from contract import Job


def main() -> None:
    job = Job()
    quantized = job.folder / "int8.onnx"
    batches = job.calibration_batches()
    with job.call():
        dataset = nncf.Dataset(batches, lambda batch: {"input": batch})
        model = nncf.quantize(onnx.load(job.float_onnx), dataset, subset_size=len(batches))
        onnx.save(model, quantized)
    job.finish(
        ["nncf", "onnxruntime", "onnx"], {"qdq": logits.of_onnx(quantized)}, {"qdq": quantized}
    )


if __name__ == "__main__":
    main()
