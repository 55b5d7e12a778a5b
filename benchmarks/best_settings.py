"""What the settings beyond the default reach: ADA on EfficientNet-Lite0, DMQ on MiniLM.

    python benchmarks/best_settings.py [vision] [peer] [text]

Vision: calibration on 32 crops of 8 photos, SQNR of logits and top-1 agreement with float on 192
crops of 12 other photos, for 8- and 4-bit weights (4-bit where they can be packed: depthwise
convolutions and the stem keep 8), with ADA's time. Peer: Sony MCT on the same crops, where
`python benchmarks/peers.py install mct` has been. Text: Pearson correlation of document
similarity with people's, with one channel of a residual stream made 50 times larger (and the
weights behind it smaller), with and without balancing. Results go to
`results/best_settings.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor, nn

import amct_pytorch as amct

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

RESULTS = Path(__file__).parent / "results" / "best_settings.json"
ITERATIONS = 200
Edit = Callable[[dict[str, Any]], None]


def calibrated(
    model: nn.Module, batches: Sequence[tuple[Tensor, ...]], folder: Path, edit: Edit
) -> tuple[nn.Module, float]:
    """The simulated network, and CPU seconds of its calibration passes."""
    config, record = folder / "config.json", folder / "record.txt"
    record.unlink(missing_ok=True)
    amct.create_quant_config(config, model, batches[0], batch_num=len(batches))
    document = json.loads(config.read_text())
    balanced = False
    for value in document.values():
        if isinstance(value, dict):
            edit(value)
            balanced |= "dmq_balancer_param" in value
    config.write_text(json.dumps(document))
    with torch.no_grad():
        if balanced:
            # One pass is what is expected; this many texts fit into one batch.
            amct.quantize_preprocess(config, record, model, batches[0])(*batches[0])
        quantized = amct.quantize_model(config, folder / "m.onnx", record, model, batches[0])
        began = time.process_time()
        for batch in batches:
            quantized(*batch)
    return quantized, time.process_time() - began


def bits(number: int) -> Edit:
    """Weights of so many bits, rounded to the nearest."""

    def edit(layer: dict[str, Any]) -> None:
        layer["weight_quant_params"]["num_bits"] = number

    return edit


def ada(number: int) -> Edit:
    """Weights of so many bits, rounded by ADA."""

    def edit(layer: dict[str, Any]) -> None:
        layer["weight_quant_params"] |= {
            "wts_algo": "ada_quantize",
            "num_bits": number,
            "num_iteration": ITERATIONS,
        }

    return edit


def vision(folder: Path) -> dict[str, Any]:
    """EfficientNet-Lite0."""
    from fidelity import compare
    from real_models import calibration_crops, efficientnet_lite0, heldout_crops

    model, heldout = efficientnet_lite0(), heldout_crops()
    batches = [(batch,) for batch in calibration_crops().images.split(8)]

    def logits(network: nn.Module) -> Tensor:
        with torch.no_grad():
            return torch.cat([network(part) for part in heldout.images.split(16)])

    wanted = logits(model)
    found: dict[str, Any] = {}
    settings = {"W8A8": bits(8), "W8A8 ADA": ada(8), "W4A8": bits(4), "W4A8 ADA": ada(4)}
    for name, edit in settings.items():
        quantized, seconds = calibrated(model, batches, folder, edit)
        fidelity = compare(wanted.numpy(), logits(quantized).numpy(), heldout.labels.numpy())
        found[name] = {
            "sqnr_db": fidelity.sqnr_db,
            "agreement": fidelity.agreement,
            "calibration_cpu_s": seconds,
        }
        if "ADA" in name:
            found[name]["layers"] = ada_notes(folder)
        print(name, {key: value for key, value in found[name].items() if key != "layers"})
    return found


def peer(_: Path) -> dict[str, Any]:
    """Sony MCT, in a process of its own, judged by the same function on the same crops."""
    import numpy as np
    from fidelity import compare
    from peers import PEERS
    from real_models import efficientnet_lite0, heldout_crops
    from run import WORK, prepare, run_once

    (contender,) = (one for one in PEERS if one.name == "mct")
    result = run_once(contender, prepare(), evaluate=True)
    if "left_out" in result:
        print(result)
        return result
    model, heldout = efficientnet_lite0(), heldout_crops()
    with torch.no_grad():
        wanted = torch.cat([model(part) for part in heldout.images.split(16)])
    with np.load(WORK / contender.name / "logits.npz") as arrays:
        fidelity = compare(wanted.numpy(), arrays["simulated"], heldout.labels.numpy())
    found = {
        "packages": result["packages"],
        "sqnr_db": fidelity.sqnr_db,
        "agreement": fidelity.agreement,
        "phases": result["phases"],
    }
    print(found)
    return found


def ada_notes(folder: Path) -> dict[str, str]:
    """What the ledger says of ADA, by layer."""
    amct.save_model(folder / "m.onnx", folder / "record.txt", folder / "net")
    layers = json.loads((folder / "net_ledger.json").read_text())["layers"]
    return {
        layer["name"]: note for layer in layers for note in layer["notes"] if note.startswith("ADA")
    }


def with_outlier(model: nn.Module, factor: float) -> nn.Module:
    """One channel behind each feed-forward's GELU made larger, the weights that it meets smaller.

    In exact arithmetic the network stays as it is.
    """
    for name, module in model.named_modules():
        if name.endswith("output.dense") and "attention" not in name:
            with torch.no_grad():
                module.weight[:, 7] /= factor
            module.register_forward_pre_hook(_larger(factor))
    return model


def _larger(factor: float) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        scale = torch.ones(args[0].shape[-1])
        scale[7] = factor
        return (args[0] * scale, *args[1:])

    return hook


def text(folder: Path) -> dict[str, Any]:
    """MiniLM."""
    from text_similarity import batches, calibration_texts, lee_documents, minilm, pearson

    documents = lee_documents()
    found: dict[str, Any] = {}

    def correlation(network: nn.Module, judged: list[tuple[Tensor, ...]]) -> float:
        with torch.no_grad():
            vectors = torch.cat([network(*batch) for batch in judged]).numpy()
        return pearson(vectors, documents.similarity)

    def plain(layer: dict[str, Any]) -> None:
        layer["activation_quant_params"] |= {
            "max_percentile": 1.0,
            "min_percentile": 1.0,
            "search_range": [1.0, 1.3],
        }

    def balanced(layer: dict[str, Any]) -> None:
        plain(layer)
        layer["dmq_balancer_param"] = 0.5

    for factor in (1.0, 50.0):
        model, tokenizer = minilm()
        model = with_outlier(model, factor)
        judged = list(batches(tokenizer, documents.texts))
        data = list(batches(tokenizer, calibration_texts(64)))
        row = {"float": correlation(model, judged)}
        for name, edit in (("W8A8", plain), ("W8A8 DMQ", balanced)):
            quantized, _ = calibrated(model, data, folder, edit)
            row[name] = correlation(quantized, judged)
        found[f"channel x {factor:g}"] = row
        print(factor, row)
    return found


def main() -> None:
    """Runs what is asked for and adds it to the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=["vision", "peer", "text"])
    torch.set_num_threads(1)
    for what in parser.parse_args().what:
        with tempfile.TemporaryDirectory() as folder:
            found = {"vision": vision, "peer": peer, "text": text}[what](Path(folder))
        document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        document[what] = found
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
