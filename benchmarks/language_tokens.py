"""Wikipedia text for SmolLM2-135M: what benchmarks calibrate on and what they evaluate on.

The loaders of the examples are found through here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from language_model import articles, load, perplexity, windows

__all__ = ["articles", "calibration_and_evaluation", "load", "perplexity", "windows"]

CALIBRATION, EVALUATION, LENGTH = 32, 16, 256


def calibration_and_evaluation(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Tokens [CALIBRATION, LENGTH] and [EVALUATION, LENGTH] of different articles.

    Evaluation is the beginning of the dump; each window of calibration begins another article,
    and these lie at even distances behind it.
    """
    texts = articles()
    evaluation = windows(tokenizer, texts, EVALUATION, LENGTH)
    others = texts[len(texts) - 2 * CALIBRATION :: 2]
    starts = [windows(tokenizer, [text], 1, LENGTH) for text in others]
    return torch.cat(starts), evaluation
