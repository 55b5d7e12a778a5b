"""Sony's Model Compression Toolkit: post-training quantization of the torch module, simulated."""

import sys
from types import ModuleType

import logits
import torch
from contract import Job
from plain_network import plain
from real_models import efficientnet_lite0

# MCT only has to find torchvision: a build for CUDA will do, whose operators do not load and could
# not be described.
sys.modules["torchvision._meta_registrations"] = ModuleType("torchvision._meta_registrations")


def main() -> None:
    job = Job()
    torch.set_num_threads(1)
    import model_compression_toolkit as mct

    model = plain(efficientnet_lite0())

    def representative_data():
        for batch in job.calibration_batches():
            yield [torch.from_numpy(batch)]

    with job.call():
        quantized, _ = mct.ptq.pytorch_post_training_quantization(model, representative_data)
    quantized.eval()
    job.finish(
        ["model-compression-toolkit", "torch"],
        {"simulated": logits.of_module(quantized)},
        note="given the plain network; default target platform",
    )


if __name__ == "__main__":
    main()
