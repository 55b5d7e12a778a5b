"""Quantize every Linear of a sentence encoder to int8 and judge it by people's opinion.

Calibrates on news items that are not among those judged, and compares the similarity of documents
by the float network, by its simulation, and by the deploy model's own integer arithmetic. `make
real-models` installs what it needs; files go to `outputs/sentence_encoder/`.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from flow import Quantized, quantize
from text_similarity import batches, calibration_texts, lee_documents, minilm, pearson

FOLDER = Path("outputs") / "sentence_encoder"
CALIBRATION_TEXTS = 64
GOAL = 0.02
"""Most that the correlation may differ from the float network's."""
LIMIT = GOAL

# Attention hangs on a few large values. Ranges of least mean squared error clip them, which costs
# more than the finer steps gain, so here the ranges reach everything that calibration saw.
UNCLIPPED = {"max_percentile": 1.0, "min_percentile": 1.0, "search_range": [1.0, 1.3]}


def correlations() -> tuple[dict[str, float], Quantized]:
    """Pearson correlation with people of the float, the simulated and the deployed network."""
    model, tokenizer = minilm()
    documents = lee_documents()
    judged = list(batches(tokenizer, documents.texts))
    data = list(batches(tokenizer, calibration_texts(CALIBRATION_TEXTS)))
    names = ["input_ids", "attention_mask"]
    axes = {name: {0: "texts", 1: "tokens"} for name in names}
    quantized = quantize(model, data, FOLDER, names, axes, UNCLIPPED)
    networks = {"float": model, "simulated int8": quantized.simulated}
    networks["deploy, DeploySession"] = quantized.deployed()
    found = {}
    with torch.no_grad():
        for name, run in networks.items():
            vectors = torch.cat([run(*batch) for batch in judged]).numpy()
            found[name] = pearson(vectors, documents.similarity)
    return found, quantized


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    found, quantized = correlations()
    print(f"\nall-MiniLM-L6-v2, 50 documents; {quantized.summary()}")
    print(f"{'model':<24}{'Pearson':>9}{'to float':>10}")
    for name, value in found.items():
        print(f"{name:<24}{value:>9.4f}{value - found['float']:>+10.4f}")


if __name__ == "__main__":
    main()
