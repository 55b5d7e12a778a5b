"""The other floor: the float network once over the calibration crops, in ONNX Runtime."""

import logits
from contract import Job
from ort_sessions import cpu_session


def main() -> None:
    job = Job()
    session = cpu_session(job.float_onnx)
    name = session.get_inputs()[0].name
    batches = job.calibration_batches()
    session.run(None, {name: batches[0]})
    with job.call():
        for batch in batches:
            session.run(None, {name: batch})
    job.finish(
        ["onnxruntime"], {"float": logits.of_onnx(job.float_onnx)}, {"float": job.float_onnx}
    )


if __name__ == "__main__":
    main()
