"""SmolLM2-135M in every kind of number that `quantize` knows: perplexity by algorithm.

    python benchmarks/low_bit_formats.py [--only mxfp4-awq int8-token-smoothquant ...]

Calibrated and evaluated as by examples/quantize_language_model.py, whose functions do the work.
A finished row goes to `results/low_bit_formats.json` at once and is not measured again, unless
``--again`` is given; ``--list`` names the rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from machine import describe

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import language_model
from quantize_language_model import HIFLOAT8, INT4, TENSOR, TOKEN, converted, token_windows

RESULTS = Path(__file__).parent / "results" / "low_bit_formats.json"
INT8, MXFP4, MXFP8 = {"type": "int8"}, {"type": "mxfp4_e2m1"}, {"type": "mxfp8_e4m3fn"}
BY_TOKEN = {**HIFLOAT8, "strategy": "token"}
# Weights, inputs (None: float), algorithm.
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, str]] = {
    "int4-minmax": (INT4, None, "minmax"),
    "int4-awq": (INT4, None, "awq"),
    "int4-gptq": (INT4, None, "gptq"),
    "mxfp4-mxquant": (MXFP4, None, "mxquant"),
    "mxfp4-awq": (MXFP4, None, "awq"),
    "mxfp4-gptq": (MXFP4, None, "gptq"),
    "int8-token-minmax": (INT8, TOKEN, "minmax"),
    "int8-token-smoothquant": (INT8, TOKEN, "smoothquant"),
    "int8-tensor-minmax": (INT8, TENSOR, "minmax"),
    "int8-tensor-smoothquant": (INT8, TENSOR, "smoothquant"),
    "hifloat8-tensor-cast": (HIFLOAT8, HIFLOAT8, "cast"),
    "hifloat8-tensor-ofmr": (HIFLOAT8, HIFLOAT8, "ofmr"),
    "hifloat8-tensor-quantile": (HIFLOAT8, HIFLOAT8, "quantile"),
    "hifloat8-tensor-smoothquant": (HIFLOAT8, HIFLOAT8, "smoothquant"),
    "hifloat8-token-ofmr": (HIFLOAT8, BY_TOKEN, "ofmr"),
    "hifloat8-token-smoothquant": (HIFLOAT8, BY_TOKEN, "smoothquant"),
    "hifloat8-weights-ofmr": (HIFLOAT8, None, "ofmr"),
    "hifloat8-weights-gptq": (HIFLOAT8, None, "gptq"),
    "mxfp8-mxquant": (MXFP8, MXFP8, "mxquant"),
}


def measure(name: str, model: Any, text: torch.Tensor, heldout: torch.Tensor) -> dict[str, Any]:
    """One row."""
    weights, inputs, algorithm = ROWS[name]
    quantized, seconds = converted(model, algorithm, (weights, inputs, algorithm), text)
    value = language_model.perplexity(quantized, heldout, use_cache=False)
    layer = quantized.amct_ledger.quantized[0]
    told = f"{layer.weights}, {layer.inputs or '-'}"
    return {"formats": told, "algorithm": algorithm, "perplexity": value, "cpu_s": round(seconds)}


def main() -> None:
    """Measures rows and keeps them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", default=list(ROWS))
    parser.add_argument("--again", action="store_true", help="measure kept rows anew")
    parser.add_argument("--list", action="store_true", help="name the rows")
    options = parser.parse_args()
    if options.list:
        print(*ROWS, sep="\n")
        return
    torch.set_num_threads(1)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
    model, tokenizer = language_model.load()
    text, heldout = token_windows(tokenizer, calibration=32, evaluation=16, length=256)
    found["float"] = language_model.perplexity(model, heldout, use_cache=False)
    for name in options.only:
        if name in found["rows"] and not options.again:
            continue
        row = measure(name, model, text, heldout)
        found["rows"][name] = {**row, "cpu": describe()["cpu"]}
        print(f"{name}: {row['perplexity']:.2f} ({row['perplexity'] / found['float'] - 1:+.1%})")
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
