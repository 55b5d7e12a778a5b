"""int8 KV caches of SmolLM2-135M: perplexity, memory and speed against float32.

    python examples/quantize_kv_cache.py

Two ways: factors of the projections, for an engine that caches keys before rotation, and factors
of what a transformers cache holds, after it. Calibrates and evaluates on different articles.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import language_model
import torch
from torch import Tensor
from transformers import DynamicCache

import amct_pytorch as amct
from amct_pytorch.kv_cache import CalibratingCache, QuantizedCache, quantized_projections

PARAMS = {"quant_granularity": "per_channel"}


def calibrate_projections(model: Any, tokens: Tensor, out: Path, record: Path) -> float:
    """Fills `record` with factors of all K and V projections; returns processor seconds."""
    started = time.process_time()
    cfg = out / "kv.cfg"
    cfg.write_text(
        f"batch_num: {len(tokens)}\n"
        "kv_cache_quant_config {\n"
        '  quant_layers: "*.k_proj"\n'
        '  quant_layers: "*.v_proj"\n'
        "  calibration_config { ifmr_quantize { quant_granularity: per_channel } }\n"
        "}\n"
    )
    amct.create_quant_cali_config(out / "kv.json", model, config_defination=cfg)
    calibrating = amct.create_quant_cali_model(out / "kv.json", record, model)
    with torch.inference_mode():
        for window in tokens.split(1):
            calibrating(window, use_cache=False)
    return time.process_time() - started


def calibrate_cache(model: Any, tokens: Tensor, record: Path) -> float:
    """Fills `record` with factors of what the cache holds; returns processor seconds."""
    started = time.process_time()
    operator = amct.QuantCalibrationOp(record, {**PARAMS, "batch_num": len(tokens)})
    with torch.inference_mode():
        for window in tokens.split(1):
            model(window, past_key_values=CalibratingCache(model.config, operator))
    return time.process_time() - started


@torch.inference_mode()
def decode(model: Any, prompt: Tensor, cache: Any, steps: int) -> tuple[list[int], float]:
    """Greedy tokens after a prompt [1, tokens], and how many came per second."""
    logits = model(prompt, past_key_values=cache).logits
    tokens = []
    started = time.perf_counter()
    for _ in range(steps):
        tokens.append(int(logits[0, -1].argmax()))
        logits = model(torch.tensor([tokens[-1:]]), past_key_values=cache).logits
    return tokens, steps / (time.perf_counter() - started)


def main() -> None:
    """Calibrate, evaluate, decode, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/kv_cache"))
    parser.add_argument("--calibration", type=int, default=32, help="windows to calibrate on")
    parser.add_argument("--evaluation", type=int, default=16, help="windows to evaluate on")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--steps", type=int, default=32, help="tokens to decode")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)

    model, tokenizer = language_model.load()
    texts = language_model.articles()
    half = len(texts) // 2
    calibration = language_model.windows(
        tokenizer, texts[half:], options.calibration, options.length
    )
    heldout = language_model.windows(tokenizer, texts[:half], options.evaluation, options.length)

    with torch.inference_mode():
        model(calibration[:1], use_cache=False)
        started = time.process_time()
        for window in calibration.split(1):
            model(window, use_cache=False)
        forward = time.process_time() - started
    projections, rotated = options.out / "projections.txt", options.out / "cache.txt"
    for record in (projections, rotated):
        record.unlink(missing_ok=True)
    seconds = calibrate_projections(model, calibration, options.out, projections)
    print(f"calibration of projections: {seconds / forward:.2f} x the float forward")
    seconds = calibrate_cache(model, calibration, rotated)
    print(f"calibration of the cache: {seconds / forward:.2f} x the float forward")

    original = language_model.perplexity(model, heldout, use_cache=False)
    print(f"perplexity, float: {original:.3f}")
    with quantized_projections(model, projections):
        value = language_model.perplexity(model, heldout, use_cache=False)
    print(f"perplexity, int8 before rotation: {value:.3f} ({value / original - 1:+.2%})")
    value = language_model.perplexity(
        model, heldout, past_key_values=lambda: QuantizedCache(model.config, rotated)
    )
    print(f"perplexity, int8 cache: {value:.3f} ({value / original - 1:+.2%})")

    prompt = heldout[:1]
    caches: dict[str, Callable[[], Any]] = {
        "float": DynamicCache,
        "int8": lambda: QuantizedCache(model.config, rotated),
    }
    sizes = {}
    for name, made in caches.items():
        cache = made()
        _, speed = decode(model, prompt, cache, options.steps)
        sizes[name] = (
            cache.nbytes()
            if isinstance(cache, QuantizedCache)
            else sum(t.numel() * t.element_size() for x in cache.layers for t in (x.keys, x.values))
        )
        print(f"{name} cache: {sizes[name] / 2**20:.2f} MiB, {speed:.1f} tokens/s")
    print(f"int8 takes {sizes['int8'] / sizes['float']:.3f} of the float cache")


if __name__ == "__main__":
    main()
