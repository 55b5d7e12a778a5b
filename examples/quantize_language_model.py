"""SmolLM2-135M in few bits by each algorithm of `quantize`: perplexity, bytes, seconds.

    python examples/quantize_language_model.py gptq awq
    python examples/quantize_language_model.py            # all of them, about half an hour

Calibrates and evaluates on different Wikipedia articles; the head stays float.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import language_model
import torch
from torch import Tensor

import amct_pytorch as amct

INT4 = {"type": "int4", "symmetric": False, "strategy": "group", "group_size": 64}
TOKEN, TENSOR = {"type": "int8", "strategy": "token"}, {"type": "int8", "strategy": "tensor"}
HIFLOAT8 = {"type": "hifloat8"}
# What each algorithm is shown on: formats of weights and of inputs, and what rounding to the
# nearest within the extremes is called there.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any] | None, str]] = {
    "minmax": ({"type": "int8"}, None, "minmax"),
    "gptq": (INT4, None, "minmax"),
    "awq": (INT4, None, "minmax"),
    "smoothquant": ({"type": "int8"}, TOKEN, "minmax"),
    "ofmr": (HIFLOAT8, HIFLOAT8, "cast"),
    "mxquant": ({"type": "mxfp8_e4m3fn"}, {"type": "mxfp8_e4m3fn"}, "mxquant"),
    "cast": (HIFLOAT8, HIFLOAT8, "cast"),
    "quantile": (HIFLOAT8, HIFLOAT8, "cast"),
}


def converted(
    model: Any,
    algorithm: str,
    case: tuple[dict[str, Any], dict[str, Any] | None, str],
    text: Tensor,
) -> tuple[Any, float]:
    """A quantized copy of the model, and the processor seconds that it took."""
    weights, inputs, _ = case
    blocks = {"weights": weights} if inputs is None else {"weights": weights, "inputs": inputs}
    config = {
        "batch_num": len(text),
        "quant_cfg": blocks,
        "algorithm": algorithm,
        "skip_layers": "lm_head",
    }
    started = time.process_time()
    model = copy.deepcopy(model)
    amct.quantize(model, config)
    with torch.inference_mode():
        for window in text.split(1):
            model(window, use_cache=False)
    amct.convert(model)
    return model, time.process_time() - started


def token_windows(
    tokenizer: Any, calibration: int, evaluation: int, length: int
) -> tuple[Tensor, Tensor]:
    """Tokens to calibrate on and to evaluate on, of different articles, int64 [number, length]."""
    texts = language_model.articles()
    half = len(texts) // 2
    return (
        language_model.spread_windows(tokenizer, texts[half:], calibration, length),
        language_model.windows(tokenizer, texts[:half], evaluation, length),
    )


def main() -> None:
    """Quantize, convert, save, load, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("algorithms", nargs="*", metavar="algorithm", help=", ".join(CASES))
    parser.add_argument("--calibration", type=int, default=32, help="windows to calibrate on")
    parser.add_argument("--evaluation", type=int, default=16, help="windows to evaluate on")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--out", type=Path, default=Path("outputs/language_model"))
    options = parser.parse_args()
    unknown = [name for name in options.algorithms if name not in CASES]
    if unknown:
        parser.error(f"unknown algorithm {unknown[0]!r}; there are {', '.join(CASES)}")
    torch.set_num_threads(1)

    float_model, tokenizer = language_model.load()
    text, heldout = token_windows(
        tokenizer, options.calibration, options.evaluation, options.length
    )

    def perplexity(model: Any) -> float:
        return language_model.perplexity(model, heldout, use_cache=False)

    original = perplexity(float_model)
    print(f"float: perplexity {original:.2f}")
    print("| algorithm | weights, inputs | nearest | perplexity | MB of layers | seconds |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    nearest: dict[str, float] = {}
    for name in options.algorithms or CASES:
        case = CASES[name]
        key = str(case)
        if key not in nearest:
            nearest[key] = perplexity(converted(float_model, case[2], case, text[:1])[0])
        model, seconds = converted(float_model, name, case, text)
        file = options.out / f"{name}.safetensors"
        amct.save_converted(model, file)
        # What is evaluated is what the file holds.
        loaded = amct.load_converted(copy.deepcopy(float_model), file)
        value = perplexity(loaded)
        layers = model.amct_ledger.quantized
        sizes = [sum(getattr(layer, size) for layer in layers) / 1e6
                 for size in ("float_bytes", "stored_bytes")]  # fmt: skip
        told = f"{layers[0].weights}, {layers[0].inputs or '-'}"
        print(
            f"| {name} | {told} | {nearest[key]:.2f} | {value:.2f} ({value / original - 1:+.1%}) | "
            f"{sizes[0]:.0f} → {sizes[1]:.0f} | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
