"""What a contender of `low_bit_peers.py` is given, and what it hands back.

Given: a folder with the float model as transformers saves it (``float/``) and the tokens
(``calibration.npy``, ``evaluation.npy``). Handed back: a JSON file with the perplexity of the
quantized model as this module computes it, and the CPU seconds of quantizing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from language_tokens import perplexity
from torch import Tensor

GROUP = 64


class Task:
    """One contender's run.

    Attributes:
        folder: of the float model.
        arguments: the contender's own.
    """

    def __init__(self) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("--work", type=Path, required=True)
        parser.add_argument("--out", type=Path, required=True)
        known, self.arguments = parser.parse_known_args()
        self.work, self.out = known.work, known.out
        self.folder = str(self.work / "float")
        self.cpu_s = 0.0
        torch.set_num_threads(1)

    def tokens(self, name: str) -> Tensor:
        """``calibration`` or ``evaluation``, int64 [windows, length]."""
        return torch.from_numpy(np.load(self.work / f"{name}.npy"))

    def model(self) -> Any:
        """The float model, in eval mode."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        model.config.use_cache = False
        return model.eval()

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Counts the CPU seconds of quantizing, calibration included."""
        start = time.process_time()
        yield
        self.cpu_s += time.process_time() - start

    def finish(self, model: Any, version: str) -> None:
        """Evaluates the quantized model, and writes the report."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        report = {
            "perplexity": perplexity(model, self.tokens("evaluation")),
            "cpu_s": self.cpu_s,
            "peak_mb": peak,
            "version": version,
        }
        self.out.write_text(json.dumps(report))
