"""EfficientNet-Lite0 as an ONNX file, and photos in folders, for `examples/command_line.sh`."""

from __future__ import annotations

import logging
import shutil
import sys
import warnings
from pathlib import Path

import torch
from real_models import CALIBRATION_PHOTOS, INPUT_SIZE, efficientnet_lite0, photo_files


def main() -> None:
    """Write ``lite0.onnx``, ``calibration/`` and ``heldout/`` into the folder that is named."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # packages it would like to have
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            efficientnet_lite0(),
            (torch.zeros(2, 3, INPUT_SIZE, INPUT_SIZE),),
            folder / "lite0.onnx",
            dynamo=True,
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )
    for number, photo in enumerate(photo_files()):
        part = folder / ("calibration" if number < CALIBRATION_PHOTOS else "heldout")
        part.mkdir(exist_ok=True)
        shutil.copy(photo, part)


if __name__ == "__main__":
    main()
