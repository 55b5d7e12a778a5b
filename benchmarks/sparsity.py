"""Sparsity on Fashion-MNIST, and what one epoch of training brings back.

    python benchmarks/sparsity.py two_of_four
    python benchmarks/sparsity.py search
    python benchmarks/sparsity.py combined
    python benchmarks/sparsity.py combined_two_of_four

The small ResNet of `examples/fashion_mnist.py` (91.8 % float), by the examples `prune_two_of_four`,
`search_pruning` and `prune_and_quantize`; one thread. Results go to `results/sparsity.json`, and
the table of all that is there to `README.md`. Each takes minutes; Fashion-MNIST is the Debian
package dataset-fashion-mnist (see the example).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import prune_and_quantize
import prune_two_of_four
import search_pruning
import torch
from machine import describe
from table import replace

RESULTS = Path(__file__).parent / "results" / "sparsity.json"
README = Path(__file__).parent / "README.md"
WHAT: dict[str, Callable[[int], dict[str, Any]]] = {
    "two_of_four": lambda images: prune_two_of_four.run(count=images),
    "search": lambda images: search_pruning.run(count=images),
    "combined": lambda images: prune_and_quantize.run("channels", images),
    "combined_two_of_four": lambda images: prune_and_quantize.run("two_of_four", images),
}


def rows(found: dict[str, Any]) -> list[tuple[str, dict[str, Any], float, float | None, str]]:
    """Title, figures, accuracy after training and before it, and what else there is."""
    lines: list[tuple[str, dict[str, Any], float, float | None, str]] = []
    if (one := found.get("two_of_four")) is not None:
        lines.append(("2:4", one, one["trained"], one["untrained"], ""))
    if (one := found.get("search")) is not None:
        for key, title in (("uniform", "one ratio for all layers"), ("searched", "searched")):
            mine = one[key]
            beside = f"{mine['macs_ratio']:.3f} × fewer MACs"
            if key == "searched":
                beside += f"; search {one['search_cpu_s']:.1f} CPU s"
            lines.append((f"channels, {title}", one, mine["trained"], mine["untrained"], beside))
    for key, title in (("combined", "half the MACs"), ("combined_two_of_four", "2:4")):
        if (one := found.get(key)) is not None:
            before, after = one["bytes"]
            beside = f"file × {after / before:.3f}"
            lines.append((f"{title} and int8", one, one["compressed"], None, beside))
    return lines


def table(found: dict[str, Any]) -> str:
    """The figures as text for the README."""
    lines = [
        "| | images | float % | before training % | trained % | points | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for title, figures, after, untrained, beside in rows(found):
        before = figures["float"]
        cell = "" if untrained is None else f"{untrained:.2f}"
        lines.append(
            f"| {title} | {figures['images']:,} | {before:.2f} | {cell} | {after:.2f} "
            f"| {after - before:+.2f} | {beside} |"
        )
    return f"CPU: {found['machine']['cpu']}; one thread.\n\n" + "\n".join(lines)


def main() -> None:
    """Measures one, and rewrites the results and their table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("--images", type=int, default=60000, help="to train on for one epoch")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = WHAT[options.what](options.images)
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    document |= {"machine": describe(), options.what: found}
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    replace(README, "sparsity", table(document))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
