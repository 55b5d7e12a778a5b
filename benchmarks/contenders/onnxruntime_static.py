"""ONNX Runtime's static quantizer: MinMax, unsigned or signed activations, int8 per channel."""

import logits
from contract import Job, arguments
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process


class Batches(CalibrationDataReader):
    """The calibration batches, in the form the quantizer reads them."""

    def __init__(self, name, batches):
        self._feeds = iter([{name: batch} for batch in batches])

    def get_next(self):
        """The next feed, or None at the end."""
        return next(self._feeds, None)


def main() -> None:
    parser = arguments()
    parser.add_argument("--activations", choices=["u8", "s8"], default="u8")
    given = parser.parse_args()
    job = Job(given)
    prepared, quantized = job.folder / "prepared.onnx", job.folder / "int8.onnx"
    with job.call():
        quant_pre_process(str(job.float_onnx), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(quantized),
            Batches("input", job.calibration_batches()),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8 if given.activations == "u8" else QuantType.QInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            calibrate_method=CalibrationMethod.MinMax,
        )
    job.finish(["onnxruntime", "onnx"], {"qdq": logits.of_onnx(quantized)}, {"qdq": quantized})


if __name__ == "__main__":
    main()
