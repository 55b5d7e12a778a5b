"""The floor: the float network once over the calibration crops, in torch."""

import logits
import torch
from contract import Job
from real_models import efficientnet_lite0


def main() -> None:
    job = Job()
    torch.set_num_threads(1)
    model = efficientnet_lite0()
    batches = [torch.from_numpy(batch) for batch in job.calibration_batches()]
    with torch.inference_mode():
        model(batches[0])  # first call: memory is allocated, kernels are chosen
        with job.call():
            for batch in batches:
                model(batch)
    job.finish(["torch"], {"float": logits.of_module(model)})


if __name__ == "__main__":
    main()
