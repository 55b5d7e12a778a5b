"""GPTQ: one layer against the textbook loop, and SmolLM2-135M from end to end.

Everything runs in one thread; CPU seconds are what counts on a shared machine. The textbook is
what the paper's own code does: Cholesky, inverse, Cholesky again, and a column loop in blocks of
128. `--model` needs the packages of `examples/language_model.py` and some minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch
from language_tokens import calibration_and_evaluation, load, perplexity
from machine import describe
from torch import Tensor, nn

import amct_pytorch as amct
from amct_pytorch.algorithms.gptq import GptqSettings, solve_gptq
from amct_pytorch.formats import FORMATS, Granularity

RESULTS = Path(__file__).parent / "results" / "gptq.json"
README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- gptq: begin -->", "<!-- gptq: end -->"
SIZES = (1024, 4096)
GROUP = 128
SWEEPS = (0, 1)
GROUP_64 = {"type": "int4", "symmetric": False, "strategy": "group", "group_size": 64}
CHANNEL = {"type": "int4", "symmetric": True, "strategy": "channel"}


def layer(size: int) -> tuple[Tensor, Tensor]:
    """A weight [size, size] and the Hessian of correlated inputs of very different scale."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(size, size, generator=generator) / size**0.5
    scale = torch.rand(size, generator=generator).mul(3).exp()
    x = torch.randn(2 * size, size, generator=generator) @ mixing * scale
    return torch.randn(size, size, generator=generator) * 0.02, x.T @ x / len(x)


def textbook(weight: Tensor, hessian: Tensor) -> Tensor:
    """GPTQ (arXiv 2210.17323, algorithm 1), int4 symmetric by groups; [N, K] rounded."""
    w, h = weight.clone(), hessian.clone()
    h.diagonal().add_(0.01 * h.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    rounded = torch.zeros_like(w)
    for start in range(0, w.shape[1], 128):
        stop = min(start + 128, w.shape[1])
        block, factor = w[:, start:stop].clone(), inverse[start:stop, start:stop]
        errors = torch.zeros_like(block)
        for k in range(stop - start):
            if (start + k) % GROUP == 0:
                group = w[:, start + k : start + k + GROUP]
                scale = group.abs().amax(1) / 7
            column = torch.clamp(torch.round(block[:, k] / scale), -8, 7) * scale
            errors[:, k] = (block[:, k] - column) / factor[k, k]
            block[:, k:] -= errors[:, k : k + 1].matmul(factor[k : k + 1, k:])
            rounded[:, start + k] = column
        w[:, stop:] -= errors @ inverse[start:stop, stop:]
    return rounded


def solver_rows(size: int, runs: int) -> dict:
    """CPU seconds (best of `runs`) and output errors of one layer."""
    weight, hessian = layer(size)
    row = {"textbook": measured(lambda: textbook(weight, hessian), runs)}
    error = weight - textbook(weight, hessian)
    row["textbook"]["loss"] = float(((error @ hessian) * error).sum())
    for sweeps in SWEEPS:
        settings = GptqSettings(sweeps=sweeps)

        def solve(settings: GptqSettings = settings):
            granularity = Granularity("group", GROUP)
            return solve_gptq(weight, hessian, FORMATS["int4"], granularity, settings=settings)

        found = solve()
        row[f"ours, {sweeps} sweeps"] = measured(solve, runs) | {"loss": found.loss}
        row["nearest"] = {"loss": found.loss_nearest}
    return row


def measured(call: Callable[[], object], runs: int) -> dict[str, float]:
    """CPU seconds of the fastest run."""
    best = math.inf
    for _ in range(runs):
        start = time.process_time()
        call()
        best = min(best, time.process_time() - start)
    return {"cpu_s": best}


def model_row(weights: dict, algorithm: str, batches: int, by_blocks: bool) -> dict:
    """Perplexity, CPU seconds and peak memory of one way to quantize SmolLM2-135M."""
    model, tokenizer = load()
    calibration, evaluation = calibration_and_evaluation(tokenizer)
    batched = calibration.chunk(batches)
    with torch.inference_mode():
        forward = measured(lambda: [model(x, use_cache=False) for x in batched], 1)["cpu_s"]
    config = {
        "batch_num": batches,
        "quant_cfg": {"weights": weights},
        "algorithm": algorithm,
        "skip_layers": "lm_head",
    }
    amct.quantize(model, config)
    before = peak_gb()
    start = time.process_time()
    if by_blocks:
        amct.calibrate_blocks(model, [{"input_ids": x} for x in batched])
    else:
        with torch.inference_mode():
            for x in batched:
                model(x, use_cache=False)
    row = {
        "cpu_s": time.process_time() - start,
        "float_forward_s": forward,
        "peak_gb": peak_gb(),
        "peak_gb_before": before,
    }
    use_reference_kernels(amct.convert(model))
    return row | {"perplexity": perplexity(model, evaluation)}


def use_reference_kernels(model: nn.Module) -> None:
    """Perplexities are those of the stored weights, not of fast kernels' bfloat16."""
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = "reference"


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def model_rows() -> dict[str, dict]:
    model, tokenizer = load()
    _, evaluation = calibration_and_evaluation(tokenizer)
    return {
        "float": {"perplexity": perplexity(model, evaluation)},
        "g64 nearest": model_row(GROUP_64, "minmax", 1, False),
        "g64 gptq": model_row(GROUP_64, "gptq", 4, False),
        "g64 gptq by blocks": model_row(GROUP_64, "gptq", 1, True),
        "channel nearest": model_row(CHANNEL, "minmax", 1, False),
        "channel gptq": model_row(CHANNEL, "gptq", 4, False),
    }


def tables(results: dict) -> str:
    lines = [
        f"CPU: {results['machine']['cpu']}; one thread, int4 symmetric in groups of {GROUP}.",
        "",
        "| one layer, Hessian given | CPU s | of the textbook | output error |",
        "| --- | --- | --- | --- |",
    ]
    for size, row in results["solver"].items():
        base = row["textbook"]["cpu_s"]
        for name, values in row.items():
            cpu = values.get("cpu_s")
            times = "– | –" if cpu is None else f"{cpu:.2f} | {cpu / base:.2f} ×"
            relative = values["loss"] / row["nearest"]["loss"]
            lines.append(f"| {size}², {name} | {times} | {relative:.2f} |")
    if "model" in results:
        lines += ["", "| SmolLM2-135M | perplexity | CPU s (float forward) | peak GB (before) |"]
        lines += ["| --- | --- | --- | --- |"]
        for name, row in results["model"].items():
            cost = "– | –"
            if "cpu_s" in row:
                cost = (
                    f"{row['cpu_s']:.0f} ({row['float_forward_s']:.0f}) | "
                    f"{row['peak_gb']:.2f} ({row['peak_gb_before']:.2f})"
                )
            lines.append(f"| {name} | {row['perplexity']:.2f} | {cost} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="store_true", help="measure SmolLM2-135M too")
    parser.add_argument("--runs", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {"machine": describe()}
    results["solver"] = {str(size): solver_rows(size, options.runs) for size in SIZES}
    if options.model:
        results["model"] = model_rows()
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    text = README.read_text()
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    README.write_text(f"{text[:start]}\n{tables(results)}\n{text[end:]}")
    print(tables(results))


if __name__ == "__main__":
    main()
