"""The rows of the accuracy table: each feature on the real models that it is for.

A row drives an example or another benchmark, so that what the table says is what users can run.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accuracy_tools import ROOT, Figures, Row, ledger_size, numbers, over_fashion, printed
from torch import Tensor, nn

FASHION = "Fashion-MNIST ResNet"
LITE0 = "EfficientNet-Lite0"
MINILM = "all-MiniLM-L6-v2"
SMOLLM = "SmolLM2-135M"
WAIFU2X = "waifu2x"
BRAIN = "deepbrain 3-D U-Net"

TOP1, AGREEMENT = "top-1 %", "agreement with float, top-1 %"
PEARSON, PSNR, DICE, PERPLEXITY = "Pearson", "PSNR dB", "Dice", "perplexity"
SQNR = "logits SQNR dB"


def _bits(number: int, ada: bool = False) -> Callable[[dict[str, Any]], None]:
    import best_settings

    return best_settings.ada(number) if ada else best_settings.bits(number)


def _calibrated(
    folder: Path,
    model: nn.Module,
    batches: Sequence[tuple[Tensor, ...]],
    edit: Callable[[dict[str, Any]], None],
) -> tuple[nn.Module, float]:
    """The simulated network, and the size of its deploy model."""
    import best_settings

    import amct_pytorch as amct

    simulated, _ = best_settings.calibrated(model, batches, folder, edit)
    amct.save_model(folder / "m.onnx", folder / "record.txt", folder / "net")
    return simulated, ledger_size(folder / "net_ledger.json")


def calibrate_fashion(folder: Path, *, bits: int, ada: bool = False) -> Figures:
    """Post-training quantization of the network of examples/fashion_mnist.py, 128 images."""
    from fashion_mnist import accuracy, load, trained

    model, test = trained(), load("t10k")
    batches = [(part,) for part in load("train")[0][:128].split(32)]
    simulated, size = _calibrated(folder, model, batches, _bits(bits, ada))
    return Figures(accuracy(model, *test), accuracy(simulated, *test), size)


def calibrate_lite0(folder: Path, *, bits: int, ada: bool = False) -> Figures:
    """Post-training quantization, 32 crops of 8 photos; judged on 192 crops of 12 others."""
    from fidelity import compare
    from real_models import calibration_crops, efficientnet_lite0, heldout_crops

    model, held = efficientnet_lite0(), heldout_crops()
    batches = [(part,) for part in calibration_crops().images.split(8)]
    simulated, size = _calibrated(folder, model, batches, _bits(bits, ada))

    def logits(network: nn.Module) -> Any:
        with torch.no_grad():
            return torch.cat([network(part) for part in held.images.split(16)]).numpy()

    wanted = logits(model)
    judged = compare(wanted, logits(simulated), held.labels.numpy())
    own = compare(wanted, wanted, held.labels.numpy())
    note = f"SQNR {judged.sqnr_db:.1f} dB, agreement {100 * judged.agreement:.1f} %"
    return Figures(100 * own.top1, 100 * judged.top1, size, note)


def real_model(folder: Path, *, module: str, function: str) -> Figures:
    """One of the examples of `make real-models`: the worst of simulation and deploy session."""
    example: Any = importlib.import_module(module)
    example.FOLDER = folder
    found, quantized = getattr(example, function)()
    size = ledger_size(folder / "net_ledger.json")
    own = found.pop("float")
    return Figures(own, min(found.values()), size, quantized.summary())


def balance_minilm(folder: Path) -> Figures:
    """DMQ on MiniLM with one channel behind each GELU 50 times as large."""
    import best_settings

    found = best_settings.text(folder)["channel x 50"]
    return Figures(
        found["float"],
        found["W8A8 DMQ"],
        None,
        f"one channel 50 times as large; {found['W8A8']:.4f} without balancing",
    )


def low_bit(_: Path, *, algorithm: str) -> Figures:
    """One algorithm of `quantize` on SmolLM2."""
    text = printed("quantize_language_model.py", algorithm)
    own = numbers(text, r"float: perplexity ([\d.]+)")[0]
    label, nearest, found, before, after = _low_bit_line(text, algorithm)
    return Figures(own, found, after / before, f"{label}; {nearest:.2f} by the extremes alone")


def _low_bit_line(text: str, algorithm: str) -> tuple[str, float, float, float, float]:
    shown = re.search(
        rf"\| {algorithm} \| (.*?) \| ([\d.]+) \| ([\d.]+) \(.*?\) \| (\d+) → (\d+) \|", text
    )
    if shown is None:
        raise SystemExit(f"no line of {algorithm} was printed; has the example changed?")
    nearest, found, before, after = (float(group) for group in shown.groups()[1:])
    return shown.group(1), nearest, found, before, after


def kv_cache(_: Path) -> Figures:
    """int8 caches of SmolLM2, by channel."""
    text = printed("quantize_kv_cache.py")
    return Figures(
        *numbers(text, r"perplexity, float: ([\d.]+)"),
        *numbers(text, r"perplexity, int8 cache: ([\d.]+)"),
        *numbers(text, r"int8 takes ([\d.]+) of the float cache"),
        "size of the cache",
    )


def train_fashion(_: Path, *, bits: int) -> Figures:
    """Quantization-aware training, an epoch."""
    text = printed("train_quantized.py", "--bits", str(bits))
    found = json.loads(text.strip().splitlines()[-1])
    size = over_fashion(
        ROOT / "outputs" / "train_quantized" / f"int{bits}" / "net_deploy_model.onnx"
    )
    note = f"{found['post-training']:.2f} with ranges only"
    return Figures(found["float"], found["fake-quant file"], size, note)


def train_lite0(_: Path) -> Figures:
    """Quantization-aware training towards the float network's logits, 100 steps."""
    import qat_flow

    # As `python benchmarks/qat_flow.py lite0`.
    options = argparse.Namespace(steps=100, views=4, rate=1e-5, others=30, clips=100)
    found = qat_flow.run_lite0(options)
    note = f"{found['post-training, dB']:.1f} dB by calibration with bias correction"
    return Figures(None, found["trained, dB"], None, note)


def distill_fashion(_: Path, *, bits: int) -> Figures:
    """Block-wise distillation, 512 images without labels."""
    text = printed("distill_fashion_mnist.py", "--bits", str(bits))
    ranges = numbers(text, r"bits, post-training +([\d.]+) %")[0]
    size = over_fashion(ROOT / "outputs" / "distill_fashion_mnist" / "net_deploy_model.onnx")
    return Figures(
        *numbers(text, r"(?m)^float +([\d.]+) %"),
        *numbers(text, r"its fake-quant file, ONNX Runtime +([\d.]+) %"),
        size,
        f"{ranges:.2f} with ranges only",
    )


def distill_lite0(_: Path, *, bits: int) -> Figures:
    """Block-wise distillation, 64 crops without labels."""
    import distillation

    # As `python benchmarks/distillation.py`.
    found = distillation.run(bits, epochs=4, group=1, rate={8: 1e-4, 4: 1e-3}[bits])
    ranges, distilled = found["ranges only"], found["distilled"]
    note = f"SQNR {distilled['sqnr_db']:.1f} dB; with ranges only {ranges['agreement']:.1f} %"
    return Figures(100.0, distilled["agreement"], None, note)


def prune_fashion(_: Path) -> Figures:
    """Channel pruning by 0.3, an epoch of training."""
    text = printed("prune_channels.py")
    own, before, after = numbers(text, r"float ([\d.]+) %, pruned ([\d.]+) %, trained ([\d.]+) %")
    size = over_fashion(ROOT / "outputs" / "prune_channels" / "net_deploy_model.onnx")
    return Figures(own, after, size, f"{before:.2f} before training")


def two_of_four_fashion(_: Path) -> Figures:
    """2:4 sparsity, an epoch of training."""
    text = printed("prune_two_of_four.py")
    own, before, after = numbers(text, r"float ([\d.]+) %, 2:4 ([\d.]+) %, trained ([\d.]+) %")
    return Figures(own, after, None, f"{before:.2f} before training; half of the weights are zero")


def search_fashion(_: Path) -> Figures:
    """Ratios by search, an epoch of training."""
    text = printed("search_pruning.py")
    (own,) = numbers(text, r"(?m)^float: ([\d.]+) %")
    fewer, _, after = numbers(
        text, r"searched: ([\d.]+) times fewer MACs, ([\d.]+) %, trained ([\d.]+) %"
    )
    (uniform,) = numbers(text, r"uniform: .* trained ([\d.]+) %")
    note = f"{fewer:.2f} times fewer MACs; {uniform:.2f} with one ratio for all layers"
    return Figures(own, after, None, note)


def combine_fashion(_: Path, *, sparsity: str) -> Figures:
    """Sparsity and int8 together, an epoch of training."""
    text = printed("prune_and_quantize.py", "--sparsity", sparsity)
    own, found = numbers(text, r"float ([\d.]+) %, compressed ([\d.]+) %")
    (size,) = numbers(text, r"bytes \(x ([\d.]+)\)")
    return Figures(own, found, size)


def decompose_waifu2x(_: Path) -> Figures:
    """Split to 70 % of the FLOPs by data, 200 steps of fine-tuning."""
    text = printed("decompose_online.py")
    own, split = numbers(text, r"held-out photos: ([\d.]+) dB; split ([\d.]+) dB")
    (after,) = numbers(text, r"steps \(\d+ s\): ([\d.]+) dB")
    (fewer,) = numbers(text, r"FLOPs ([\d.]+) times fewer")
    note = f"{fewer:.2f} times fewer FLOPs; {split:.2f} before fine-tuning"
    return Figures(own, after, None, note)


def decompose_fashion(_: Path) -> Figures:
    """Split by variational Bayes, an epoch of training; the network of the other rows."""
    import finetune_decomposed

    options = finetune_decomposed.settings(["fashion", "--width", "32"])
    found = finetune_decomposed.run_fashion(options)
    note = f"{found['flops_fewer']:.2f} times fewer FLOPs; {found['split']:.2f} before training"
    return Figures(found["float"], found["split, one epoch"], 1 / found["parameters_fewer"], note)


def search_lite0(folder: Path) -> Figures:
    """Search for a config that always gives the float network's class."""
    import auto_search

    auto_search.search(folder, 1.0)
    trials = auto_search.read(folder, "record")["trials"]
    accepted = [trial for trial in trials if trial["accepted"]]
    best = accepted[-1] if accepted else max(trials, key=lambda trial: trial["metric"])
    ledger = folder / "lite0_ledger.json"
    note = f"{len(best['rolled_back'])} layers in float, {len(trials)} trials"
    size = ledger_size(ledger) if ledger.exists() else None
    return Figures(100.0, 100 * best["metric"], size, note)


def _real(module: str, function: str) -> Callable[[Path], Figures]:
    return functools.partial(real_model, module=module, function=function)


def _low_bit_rows() -> list[Row]:
    names = ("minmax", "gptq", "awq", "smoothquant", "ofmr", "mxquant", "cast", "quantile")
    return [
        Row(
            f"low-bit-{name}",
            f"`quantize`, `{name}`",
            SMOLLM,
            PERPLEXITY,
            functools.partial(low_bit, algorithm=name),
        )
        for name in names
    ]


PTQ, ADA = "post-training, W8A8", "post-training, ADA"
ROWS = (
    Row("ptq-fashion", PTQ, FASHION, TOP1, functools.partial(calibrate_fashion, bits=8)),
    Row("ptq-lite0", PTQ, LITE0, TOP1, functools.partial(calibrate_lite0, bits=8)),
    Row("ptq-minilm", PTQ, MINILM, PEARSON, _real("quantize_sentence_encoder", "correlations")),
    Row("ptq-waifu2x", PTQ, WAIFU2X, PSNR, _real("quantize_super_resolution", "quality")),
    Row("ptq-brain", PTQ, BRAIN, DICE, _real("quantize_brain_mask", "overlaps")),
    Row(
        "ada-lite0",
        f"{ADA}, W8A8",
        LITE0,
        TOP1,
        functools.partial(calibrate_lite0, bits=8, ada=True),
    ),
    Row(
        "ada4-fashion",
        f"{ADA}, W4A8",
        FASHION,
        TOP1,
        functools.partial(calibrate_fashion, bits=4, ada=True),
    ),
    Row("dmq-minilm", "post-training, DMQ", MINILM, PEARSON, balance_minilm),
    Row("search-lite0", "search for a config, W8A8", LITE0, AGREEMENT, search_lite0),
    Row("qat8-fashion", "training, W8A8", FASHION, TOP1, functools.partial(train_fashion, bits=8)),
    Row("qat4-fashion", "training, W4A4", FASHION, TOP1, functools.partial(train_fashion, bits=4)),
    Row("qat8-lite0", "training, W8A8", LITE0, SQNR, train_lite0),
    Row(
        "distill4-fashion",
        "distillation, W4A4",
        FASHION,
        TOP1,
        functools.partial(distill_fashion, bits=4),
    ),
    Row(
        "distill8-lite0",
        "distillation, W8A8",
        LITE0,
        AGREEMENT,
        functools.partial(distill_lite0, bits=8),
    ),
    Row(
        "distill4-lite0",
        "distillation, W4A8",
        LITE0,
        AGREEMENT,
        functools.partial(distill_lite0, bits=4),
    ),
    Row("prune-fashion", "channel pruning, 0.3", FASHION, TOP1, prune_fashion),
    Row("search-prune-fashion", "pruning by search", FASHION, TOP1, search_fashion),
    Row("two-of-four-fashion", "2:4 sparsity", FASHION, TOP1, two_of_four_fashion),
    Row(
        "combined-fashion",
        "pruning, then W8A8",
        FASHION,
        TOP1,
        functools.partial(combine_fashion, sparsity="channels"),
    ),
    Row(
        "combined-2-4-fashion",
        "2:4, then W8A8",
        FASHION,
        TOP1,
        functools.partial(combine_fashion, sparsity="two_of_four"),
    ),
    Row("decompose-waifu2x", "decomposition", WAIFU2X, PSNR, decompose_waifu2x),
    Row("decompose-fashion", "decomposition", FASHION, TOP1, decompose_fashion),
    *_low_bit_rows(),
    Row("kv-cache-smollm2", "int8 KV cache", SMOLLM, PERPLEXITY, kv_cache),
)
