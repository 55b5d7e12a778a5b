"""optimum-quanto: int8 weights and activations of the torch module; it writes no ONNX."""

import logits
import torch
from contract import Job
from optimum.quanto import Calibration, freeze, qint8, quantize
from plain_network import plain
from real_models import efficientnet_lite0


def main() -> None:
    job = Job()
    torch.set_num_threads(1)
    model = plain(efficientnet_lite0())
    with job.call():
        quantize(model, weights=qint8, activations=qint8)
        with Calibration(), torch.no_grad():
            for batch in job.calibration_batches():
                model(torch.from_numpy(batch))
        freeze(model)
    converted = sorted({type(m).__name__ for m in model.modules() if hasattr(m, "qweight")})
    count = sum(hasattr(m, "qweight") for m in model.modules())
    note = f"given the plain network; {count} layers quantized ({', '.join(converted)})"
    job.finish(["optimum-quanto", "torch"], {"simulated": logits.of_module(model)}, note=note)


if __name__ == "__main__":
    main()
