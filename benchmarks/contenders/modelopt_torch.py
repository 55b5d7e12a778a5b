"""NVIDIA ModelOpt's quantizer for torch modules (simulated int8), max calibration."""

import logits
import modelopt.torch.quantization as mtq
import torch
from contract import Job
from plain_network import plain
from real_models import efficientnet_lite0


def main() -> None:
    job = Job()
    torch.set_num_threads(1)
    model = plain(efficientnet_lite0())
    batches = [torch.from_numpy(batch) for batch in job.calibration_batches()]

    def forward_loop(module):
        for batch in batches:
            module(batch)

    with job.call(), torch.no_grad():
        model = mtq.quantize(model, mtq.INT8_DEFAULT_CFG, forward_loop)
    count = sum(hasattr(m, "weight_quantizer") for m in model.modules())
    note = f"given the plain network; {count} layers quantized"
    job.finish(["nvidia-modelopt", "torch"], {"simulated": logits.of_module(model)}, note=note)


if __name__ == "__main__":
    main()
