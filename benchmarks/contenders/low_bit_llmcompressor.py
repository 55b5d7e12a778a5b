"""llm-compressor: GPTQ, int4 asymmetric in groups of 64, with activation order."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from low_bit_contract import GROUP, Task


def main() -> None:
    task = Task()
    model, calibration = task.model(), task.tokens("calibration")
    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=False, strategy="group", group_size=GROUP
    )
    recipe = GPTQModifier(
        config_groups={"all": QuantizationScheme(targets=["Linear"], weights=weights)},
        ignore=["lm_head"],
    )
    ids = calibration.tolist()
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(i) for i in ids]})
    with task.timed():
        oneshot(
            model=model,
            dataset=data,
            recipe=recipe,
            num_calibration_samples=len(ids),
            max_seq_length=calibration.shape[1],
        )
    task.finish(model, version("llmcompressor"))


if __name__ == "__main__":
    main()
