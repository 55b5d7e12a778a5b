"""SmolLM2-135M generating text with low-bit weights: speed and memory beside float32.

One sequence, greedy, on one thread: a prompt of 16 tokens, then 64 more with a key-value cache.
The contenders take turns in one process, and a ratio is the median over rounds of the float
model's CPU seconds over the contender's in the same round. Two floors are measured beside them:
the model with the products of its blocks left out, which no format can be faster than, and the
bare kernels with all blocks' weights one after another, as cold as they are in a forward pass.
Peaks of memory are of fresh processes.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch
from contract import peak_mb
from language_tokens import articles, load, windows
from machine import describe
from torch import Tensor, nn

import amct_pytorch as amct

RESULTS = Path(__file__).parent / "results" / "low_bit_decode.json"
README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- decode: begin -->", "<!-- decode: end -->"

# Hidden, key and value, and feed-forward sizes; one block's products, [outputs, inputs].
SHAPES = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
BLOCK_COUNT = 30
PROMPT, NEW, PREFILL = 16, 64, 256
INT8 = {"type": "int8", "symmetric": True, "strategy": "channel"}
INT4 = {"type": "int4", "symmetric": False, "strategy": "group", "group_size": 64}
BY_TOKEN = {"type": "int8", "symmetric": True, "strategy": "token"}
FLOAT, WITHOUT = "float32", "float32 without the blocks' products (floor)"
BLOCKS = {
    "int8 weights": {"weights": INT8},
    "int4 weights, groups of 64": {"weights": INT4},
    "int8 weights and inputs, by token": {"weights": INT8, "inputs": BY_TOKEN},
}
CONTENDERS = (FLOAT, *BLOCKS, WITHOUT)


class NoProduct(nn.Module):
    """Zeros of a linear layer's output shape."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.out_features = layer.out_features
        self.of_one = torch.zeros(1, 1, layer.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Zeros; for one token always the same tensor."""
        if x.shape[:-1] == (1, 1):
            return self.of_one
        return x.new_zeros(*x.shape[:-1], self.out_features)


def block_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of the blocks, float or quantized, by name."""
    kinds = nn.Linear | amct.low_bit.deploy_linear.LowBitLinear | NoProduct
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds)}
    return {name: layer for name, layer in found.items() if "lm_head" not in name}


def contender(name: str, model: nn.Module, tokens: Tensor) -> nn.Module:
    """The model of one row; `model` itself is changed, unless it is float."""
    if name == WITHOUT:
        for path, layer in block_layers(model).items():
            assert isinstance(layer, nn.Linear)
            model.set_submodule(path, NoProduct(layer))
    elif name != FLOAT:
        config = {"quant_cfg": BLOCKS[name], "algorithm": "minmax", "skip_layers": "lm_head"}
        amct.quantize(model, config)
        with torch.inference_mode():
            model(tokens[:, :PROMPT], use_cache=False)
        amct.convert(model)
    return model


@torch.inference_mode()
def decode(model: Any, tokens: Tensor) -> float:
    """CPU seconds for NEW tokens after the prompt."""
    out = model(tokens[:, :PROMPT], use_cache=True)
    start = time.process_time()
    for _ in range(NEW):
        token = out.logits[:, -1:].argmax(-1)
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
    return time.process_time() - start


@torch.inference_mode()
def prefill(model: Any, tokens: Tensor) -> float:
    """CPU seconds for a prompt of PREFILL tokens, with the logits of the last."""
    start = time.process_time()
    model(tokens, use_cache=True, logits_to_keep=1)
    return time.process_time() - start


def weight_bytes(model: nn.Module) -> int:
    """Memory of the blocks' linear layers, with scales and what kernels keep beside them."""
    tensors = {}
    for layer in block_layers(model).values():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensors[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(tensors.values())


def speeds(rounds: int) -> dict[str, dict[str, float]]:
    """Seconds and ratios of all contenders, taking turns."""
    float_model, tokens = loaded()
    models = {name: contender(name, copy.deepcopy(float_model), tokens) for name in CONTENDERS}
    seconds: dict[str, dict[str, list[float]]] = {
        name: {"decode": [], "prefill": []} for name in CONTENDERS
    }
    for turn in range(rounds + 1):
        for name, model in models.items():
            measured = {"decode": decode(model, tokens), "prefill": prefill(model, tokens)}
            # The first round warms up and lets kernels bring weights into their order.
            if turn:
                for step, value in measured.items():
                    seconds[name][step].append(value)
    rows = {}
    for name, model in models.items():
        row: dict[str, float] = {"weight_bytes": weight_bytes(model)}
        row["tokens_per_s"] = NEW / statistics.median(seconds[name]["decode"])
        for step, values in seconds[name].items():
            pairs = zip(seconds[FLOAT][step], values, strict=True)
            row[f"{step}_speed_up"] = statistics.median(base / value for base, value in pairs)
        rows[name] = row
    for row in rows.values():
        row["weight_ratio"] = row["weight_bytes"] / rows[FLOAT]["weight_bytes"]
    return rows


def loaded() -> tuple[nn.Module, Tensor]:
    """The float model, and PREFILL tokens of text, [1, PREFILL]."""
    model, tokenizer = load()
    return model, windows(tokenizer, articles(), 1, PREFILL)


def memory(name: str) -> dict[str, float]:
    """Resident memory while generating, and the peak from start to end, in MB."""
    model, tokens = loaded()
    model = contender(name, model, tokens)
    decode(model, tokens)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {"resident_mb": resident / 2**20, "peak_mb": peak_mb()}


def kernels(rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds of a 576 x 576 product at one token, and milliseconds of all blocks'."""
    found = {}
    for name, prepare in KERNELS.items():
        with torch.inference_mode():
            calls = [prepare(*shape) for _ in range(BLOCK_COUNT) for shape in SHAPES]
            warm = min(_seconds(calls[:1] * 500) for _ in range(rounds))
            cold = min(_seconds(calls) for _ in range(rounds))
        found[name] = {"one_product_us": warm / 500 * 1e6, "all_blocks_ms": cold * 1e3}
    return found


def _float32(n: int, k: int) -> Callable[[], Tensor]:
    x, weight = torch.randn(1, k), torch.randn(n, k)
    return lambda: nn.functional.linear(x, weight)


def _int8(n: int, k: int) -> Callable[[], Tensor]:
    x, ones = torch.randn(1, k).bfloat16(), torch.ones(n, dtype=torch.bfloat16)
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    return lambda: torch._weight_int8pack_mm(x, weight, ones)


def _int4(n: int, k: int) -> Callable[[], Tensor]:
    x, factors = torch.randn(1, k).bfloat16(), torch.ones(k // 64, n, 2, dtype=torch.bfloat16)
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    return lambda: torch._weight_int4pack_mm_for_cpu(x, packed, 64, factors)


def _integers(n: int, k: int) -> Callable[[], Tensor]:
    x = torch.randint(-127, 128, (1, k), dtype=torch.int8)
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8).t()
    return lambda: torch._int_mm(x, weight)


KERNELS = {
    "float32": _float32,
    "`_weight_int8pack_mm`": _int8,
    "`_weight_int4pack_mm_for_cpu`": _int4,
    "`_int_mm`": _integers,
}


def _seconds(calls: list[Callable[[], Tensor]]) -> float:
    start = time.process_time()
    for call in calls:
        call()
    return time.process_time() - start


def in_fresh_process(name: str) -> dict[str, float]:
    """`memory` of one contender, measured in a process of its own."""
    command = [sys.executable, __file__, "--memory", name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def tables(results: dict[str, Any]) -> str:
    lines = [
        f"CPU: {results['machine']['cpu']}; one thread. Speeds and weights relative to float32.",
        "",
        "| SmolLM2-135M | tokens/s | decoding | prompt of 256 | weights of the blocks "
        "| resident, peak MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in results["model"].items():
        held = results["memory"].get(name)
        lines.append(
            f"| {name} | {row['tokens_per_s']:.1f} | {row['decode_speed_up']:.2f} × "
            f"| {row['prefill_speed_up']:.2f} × "
            + (f"| {row['weight_ratio']:.3f} × " if row["weight_ratio"] else "| – ")
            + (f"| {held['resident_mb']:.0f}, {held['peak_mb']:.0f} |" if held else "| – |")
        )
    lines += [
        "",
        "| bare kernel, one token | 576 × 576, in cache, µs | all products of the blocks, ms "
        "| decoding, at most |",
        "| --- | --- | --- | --- |",
    ]
    whole = {name: NEW / row["tokens_per_s"] for name, row in results["model"].items()}
    rest = whole[WITHOUT] / NEW * 1e3
    base = rest + results["kernels"]["float32"]["all_blocks_ms"]
    for name, row in results["kernels"].items():
        lines.append(
            f"| {name} | {row['one_product_us']:.1f} | {row['all_blocks_ms']:.1f} "
            f"| {base / (rest + row['all_blocks_ms']):.2f} × |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        print(json.dumps(memory(options.memory)))
        return
    results: dict[str, Any] = {"machine": describe()}
    # First, while this process is small: a child's peak begins with its parent's size.
    results["memory"] = {name: in_fresh_process(name) for name in (FLOAT, *BLOCKS)}
    results["kernels"] = kernels(options.rounds)
    results["model"] = speeds(options.rounds)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    text = README.read_text()
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    README.write_text(f"{text[:start]}\n{tables(results)}\n{text[end:]}")
    print(tables(results))


if __name__ == "__main__":
    main()
