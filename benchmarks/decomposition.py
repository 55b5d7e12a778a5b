"""Decomposition of large layers: ours, other tools, and the floor.

Everything runs in one thread, the contenders of one size taking turns in one process, ours at the
start, between and at the end; the least CPU seconds of each count, as the machine may be shared.
Peers that are not installed are left out: ``pip install tensorly==0.10.0 tensorly-torch==0.5.0``
beside the toolkit. The floor is one Gram product and one symmetric eigen-decomposition of the
smaller side, the plain way to factorise one of the two kernel orders; ours looks at both.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch
from machine import describe
from torch import Tensor, nn

import amct_pytorch as amct

RESULTS = Path(__file__).parent / "results" / "decomposition.json"
README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- decomposition: begin -->", "<!-- decomposition: end -->"
# (channels in and out, kernel)
SIZES = ((512, 3), (1024, 3))
LARGE = (2048, 5)


def weight(channels: int, kernel: int) -> Tensor:
    """A random weight whose spatial form has a falling spectrum over noise."""
    generator = torch.Generator().manual_seed(0)
    side = channels * kernel
    rank = side // 8
    left = torch.randn(side, rank, generator=generator)
    right = torch.randn(rank, side, generator=generator)
    matrix = left * torch.linspace(1, 0.1, rank) @ right
    matrix += 3 * torch.randn(side, side, generator=generator)
    shaped = matrix.reshape(channels, kernel, channels, kernel).permute(2, 0, 1, 3)
    return (0.01 * shaped).contiguous()


def ours(values: Tensor) -> dict:
    conv = nn.utils.skip_init(nn.Conv2d, *values.shape[1::-1], values.shape[2:])
    conv.weight = nn.Parameter(values)
    with torch.no_grad():
        conv.bias.zero_()

    def call() -> nn.Module:
        return amct.auto_decomposition(conv)[0]

    row, measured = timed(call)
    left, right = row[0].weight.detach(), row[1].weight.detach()
    rebuilt = torch.einsum("rcij,nrkl->ncikjl", left, right).reshape(values.shape)
    error = float((rebuilt - values).norm() / values.norm())
    return measured | {"rank": left.shape[0], "error": error}


def floor(values: Tensor) -> dict:
    matrix = values.permute(1, 2, 0, 3).reshape(values.shape[1] * values.shape[2], -1)
    return timed(lambda: torch.linalg.eigh(matrix @ matrix.T))[1]


def full_svd(values: Tensor) -> dict:
    matrix = values.permute(1, 2, 0, 3).reshape(values.shape[1] * values.shape[2], -1)
    return timed(lambda: torch.linalg.svd(matrix, full_matrices=False))[1]


def tensorly_tucker(values: Tensor) -> dict:
    import tensorly
    from tensorly.decomposition import partial_tucker

    tensorly.set_backend("pytorch")
    rank = values.shape[0] // 4
    return timed(lambda: partial_tucker(values, rank=[rank, rank], modes=[0, 1]))[1]


def tensorly_torch(values: Tensor) -> dict:
    import tltorch

    conv = nn.utils.skip_init(nn.Conv2d, *values.shape[1::-1], values.shape[2:])
    conv.weight = nn.Parameter(values)
    return timed(
        lambda: tltorch.FactorizedConv.from_conv(
            conv, rank=0.25, factorization="tucker", decompose_weights=True
        )
    )[1]


CONTENDERS: dict[str, tuple[str, Callable[[Tensor], dict]]] = {
    "ours": ("**amct_pytorch**, both kernel orders, EVBMF rank, factors", ours),
    "floor": ("floor: one Gram product and eigen-decomposition", floor),
    "svd": ("spatial form by full SVD, one order", full_svd),
    "tensorly": ("tensorly 0.10 partial Tucker, rank 1/4", tensorly_tucker),
    "tensorly-torch": ("tensorly-torch 0.5 Tucker, rank 1/4 of the weights", tensorly_torch),
}


def timed(call: Callable) -> tuple:
    """What `call` returns, and its wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
    }


def run_size(names: list[str], channels: int, kernel: int) -> dict[str, dict]:
    """The contenders on one size, in a process of its own; ours once more after each other."""
    torch.set_num_threads(1)
    torch.linalg.eigh(torch.eye(64))  # the libraries' own start-up
    amct.auto_decomposition(nn.Conv2d(1, 1, 3))
    values = weight(channels, kernel)
    results: dict[str, dict] = {}
    turns = [name for other in names if other != "ours" for name in ("ours", other)]
    for name in [name for name in (*turns, "ours") if name in names]:
        try:
            result = CONTENDERS[name][1](values)
        except ImportError as error:
            results[name] = {"left_out": str(error)}
            continue
        print(f"{channels}x{kernel}", name, result, file=sys.stderr, flush=True)
        if name not in results:  # the peak is ours as long as nothing else has run
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            results[name] = result | {"peak_mb": peak} if name == "ours" else result
        elif result["cpu_s"] < results[name]["cpu_s"]:
            results[name] |= result
    return results


def table(document: dict) -> str:
    names = [name for name in CONTENDERS if any(name in row for row in document["sizes"].values())]
    header = ["contender", *(f"{size}: CPU s (wall)" for size in document["sizes"])]
    lines = [header, ["---"] * len(header)]
    for name in names:
        cells = [CONTENDERS[name][0]]
        for row in document["sizes"].values():
            result = row.get(name, {})
            cell = f"{result['cpu_s']:.2f} ({result['wall_s']:.2f})" if "cpu_s" in result else "–"
            cells.append(cell)
        lines.append(cells)
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    notes = []
    for size, row in document["sizes"].items():
        result = row.get("ours", {})
        if "rank" in result:
            notes.append(
                f"{size}: rank {result['rank']}, error {result['error']:.3f}, peak "
                f"{result['peak_mb'] / 1024:.2f} GiB"
            )
    return (
        f"CPU: {document['machine']['cpu']}; one thread. The machine was shared: CPU seconds are "
        f"the figures to compare.\n\n{text}\n\nOurs, {'; '.join(notes)}."
    )


def write(document: dict) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{table(document)}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", action="store_true", help="also 2048 x 2048 x 5 x 5, ours only")
    parser.add_argument("--only", nargs="*", choices=CONTENDERS, default=list(CONTENDERS))
    wanted = parser.parse_args()
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"sizes": {}}
    document["machine"] = describe()
    jobs = [(wanted.only, *size) for size in SIZES]
    if wanted.large:
        jobs.append((["ours"], *LARGE))
    for names, channels, kernel in jobs:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            results = pool.submit(run_size, names, channels, kernel).result()
        size = f"{channels}×{channels}×{kernel}×{kernel}"
        document["sizes"].setdefault(size, {}).update(results)
        write(document)


if __name__ == "__main__":
    main()
