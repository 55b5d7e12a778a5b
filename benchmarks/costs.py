"""What each feature costs in time and memory, as a table, from the results that are kept here.

    python benchmarks/costs.py

Measures nothing: it reads `results/*.json`, which the other benchmarks write, and puts the table
between the markers of docs/costs.md. A test compares the two, so the page cannot go stale.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from peers import HERE, ROOT
from table import lines, replace

RESULTS = HERE / "results"
PAGE = ROOT / "docs" / "costs.md"
Row = tuple[str, str, str, str, str]


@dataclass(frozen=True)
class Source:
    """One results file.

    Attributes:
        file: its name.
        target: of make, that measures it.
        rows: feature, what it was done to, time, time as a ratio, memory; from its content.
    """

    file: str
    target: str
    rows: Callable[[dict[str, Any]], Iterator[Row]]


def _efficientnet(document: dict[str, Any]) -> Iterator[Row]:
    found = document["contenders"]
    floor = found["float-torch"]["phases"]["call"]["cpu_s"]
    least = found["float-torch"]["memory"]["peak_mb"]
    export = found["float-export"]["phases"]["call"]["cpu_s"]
    for name, images in (("amct", 32), ("amct-32-batches", 256)):
        if "phases" in found.get(name, {}):
            seconds = found[name]["phases"]["call"]["cpu_s"]
            yield (
                "post-training quantization, all files",
                f"EfficientNet-Lite0, {images} crops",
                f"{seconds:.1f} s, of it torch's export {export:.1f}",
                f"{(seconds - export) / floor:.1f} × a float pass over 32 crops, export aside",
                f"{found[name]['memory']['peak_mb']:.0f} MB; float {least:.0f}",
            )


def _resnet(document: dict[str, Any]) -> Iterator[Row]:
    runs = document["runs"]
    for batches in (2, 16):
        steps = runs[f"amct, {batches}"]["seconds"]
        seconds = sum(step["cpu_s"] for step in steps.values())
        passes = runs[f"float, {batches}"]["seconds"]["float passes"]["cpu_s"]
        yield (
            "post-training quantization, all files",
            f"a network of ResNet-50's shape, {8 * batches} images",
            f"{seconds:.1f} s, of it calibration {steps['calibrate']['cpu_s']:.1f}",
            f"calibration {steps['calibrate']['cpu_s'] / passes:.1f} × the float passes",
            f"{runs[f'amct, {batches}']['peak_mb']:.0f} MB; "
            f"float {runs[f'float, {batches}']['peak_mb']:.0f}",
        )


def _best_settings(document: dict[str, Any]) -> Iterator[Row]:
    found = document["vision"]
    plain, ada = (found[name]["calibration_cpu_s"] for name in ("W8A8", "W8A8 ADA"))
    yield (
        "ADA, `num_iteration` 200",
        "EfficientNet-Lite0, 32 crops",
        f"{ada:.0f} s of calibration; {plain:.1f} without",
        f"{ada / plain:.0f} × calibration without it",
        "–",
    )


def _auto_search(document: dict[str, Any]) -> Iterator[Row]:
    ratios, evaluation = document["trial_of_an_evaluation"], document["float_evaluation_cpu_s"]
    yield (
        "search for a config",
        f"EfficientNet-Lite0, {len(ratios)} trials",
        f"{sum(ratios) * evaluation:.0f} s of trials",
        f"{max(ratios):.1f} × a float evaluation a trial, at most",
        "–",
    )


def _qat_flow(document: dict[str, Any]) -> Iterator[Row]:
    for network, found in document["costs"].items():
        yield (
            "training of a whole model, a step",
            network,
            f"{found['float_cpu_s'] * found['time_ratio']:.2f} s",
            f"{found['time_ratio']:.2f} × the float step",
            f"{found['memory_ratio']:.2f} × the float step's",
        )


def _operators(document: dict[str, Any]) -> Iterator[Row]:
    for network, found in document["int8"].items():
        ours = found["amct_pytorch, ARQ weights"]
        yield (
            "training with operators, a step",
            network,
            f"{found['float']['step_cpu_s'] * ours['time']:.2f} s",
            f"{ours['time']:.2f} × the float step",
            f"{ours['memory']:.2f} × the float step's",
        )


def _distillation(document: dict[str, Any]) -> Iterator[Row]:
    found = document["w8a8"]
    yield (
        f"distillation, {found['settings']['epochs']} epochs",
        "EfficientNet-Lite0, 64 crops",
        f"{found['cpu_seconds']:.0f} s",
        f"{found['over_float_forward_backward']:.1f} × float forward and backward",
        f"{found['peak_mb']} MB",
    )


def _low_bit(document: dict[str, Any]) -> Iterator[Row]:
    found = document["contenders"]
    names = {"nearest": "`minmax`", "gptq": "`gptq`", "awq-symmetric": "`awq`"}
    for name, label in names.items():
        if "cpu_s" in found.get(name, {}):
            yield (
                f"{label}, int4 weights in groups of 64",
                "SmolLM2-135M",
                f"{found[name]['cpu_s']:.0f} s",
                f"{found[name]['cpu_s'] / found['float']['cpu_s']:.1f} × a float pass",
                f"{found[name]['peak_mb']:.0f} MB; float {found['float']['peak_mb']:.0f}",
            )


def _gptq(document: dict[str, Any]) -> Iterator[Row]:
    for size, found in document["solver"].items():
        ours, textbook = (found[name]["cpu_s"] for name in ("ours, 1 sweeps", "textbook"))
        yield (
            "`gptq`, one layer, one sweep",
            f"{size} × {size}",
            f"{ours:.2f} s",
            f"{ours / textbook:.1f} × the textbook's loop",
            "–",
        )


def _decode(document: dict[str, Any]) -> Iterator[Row]:
    resident = document["memory"]
    for name, found in document["model"].items():
        if name in resident and name != "float32":
            yield (
                f"text from a converted model: {name}",
                "SmolLM2-135M",
                f"{found['tokens_per_s']:.0f} tokens/s",
                f"{found['decode_speed_up']:.2f} × as fast as float32",
                f"{resident[name]['resident_mb']:.0f} MB resident; "
                f"float {resident['float32']['resident_mb']:.0f}",
            )


def _decomposition(document: dict[str, Any]) -> Iterator[Row]:
    for size, found in document["sizes"].items():
        ours, floor = found["ours"], found.get("floor", {})
        ratio, least = "–", ""
        if "cpu_s" in floor:
            ratio = (
                f"{ours['cpu_s'] / floor['cpu_s']:.1f} × one Gram product and eigen-decomposition"
            )
        if "peak_mb" in floor:
            least = f"; floor {floor['peak_mb']:.0f}"
        yield (
            "decomposition of one layer",
            size,
            f"{ours['cpu_s']:.1f} s",
            ratio,
            f"{ours['peak_mb']:.0f} MB{least}",
        )


def _pruning(document: dict[str, Any]) -> Iterator[Row]:
    network, forward = "a network of ResNet-50's shape", document["cpu_s"]["forward"]
    beside = document["times_peer"]
    text = "" if beside is None else f", {beside:.2f} × Torch-Pruning's time"
    yield (
        "channel pruning, half the channels",
        network,
        f"{document['cpu_s']['ours']:.1f} s",
        f"{document['cpu_s']['ours'] / forward:.1f} × a float pass of one image{text}",
        "–",
    )
    for ratio, found in document["search"].items():
        yield (
            f"search for channels, `compress_ratio` {ratio}",
            network,
            f"{found['cpu_s']:.1f} s",
            f"{found['cpu_s'] / forward:.0f} × a float pass of one image",
            "–",
        )


def _sparsity(document: dict[str, Any]) -> Iterator[Row]:
    network = "small ResNet, 28 x 28"
    if "search" in document:
        found = document["search"]
        epoch = found["searched"]["epoch_cpu_s"]
        yield (
            "search for channels, 64 samples",
            network,
            f"{found['search_cpu_s']:.1f} s",
            f"{found['search_cpu_s'] / epoch:.3f} × an epoch of training",
            f"{found['peak_mb']:.0f} MB with all images and the training",
        )
    if "combined" in document:
        found = document["combined"]
        seconds = found["epoch_cpu_s"]
        yield (
            "channel pruning and int8 in one training",
            f"{network}, {found['images']:,} images",
            f"{found['create_cpu_s']:.1f} s, training {seconds:.0f}",
            "–",
            f"{found['peak_mb']:.0f} MB with all images",
        )


SOURCES = (
    Source("efficientnet_lite0.json", "bench", _efficientnet),
    Source("resnet50_flow.json", "bench-flow", _resnet),
    Source("best_settings.json", "bench-best", _best_settings),
    Source("auto_search.json", "bench-search", _auto_search),
    Source("qat_flow.json", "bench-qat-flow", _qat_flow),
    Source("qat.json", "bench-qat", _operators),
    Source("distillation.json", "bench-distillation", _distillation),
    Source("low_bit_peers.json", "bench-low-bit-peers", _low_bit),
    Source("gptq.json", "bench-gptq", _gptq),
    Source("low_bit_decode.json", "bench-decode", _decode),
    Source("decomposition.json", "bench-decomposition", _decomposition),
    Source("pruning.json", "bench-pruning", _pruning),
    Source("sparsity.json", "bench-sparsity", _sparsity),
)


def markdown() -> str:
    """The table, and what has no results yet."""
    header = ("feature", "what", "time", "as a ratio", "peak memory", "measured by")
    rows: list[tuple[str, ...]] = []
    absent = []
    for source in SOURCES:
        file = RESULTS / source.file
        if file.exists():
            found = source.rows(json.loads(file.read_text()))
            rows += [(*row, f"`make {source.target}`") for row in found]
        else:
            absent.append(f"`make {source.target}`")
    text = lines(header, rows)
    return f"{text}\n\nNo results are kept of: {', '.join(absent)}." if absent else text


def main() -> None:
    """Rewrites the page's table."""
    replace(PAGE, "costs", markdown())


if __name__ == "__main__":
    main()
