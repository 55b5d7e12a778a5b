"""Channel pruning of a network of ResNet-50's shape: ours and Torch-Pruning, half the channels.

Both find the network's coupled channels, choose half of each group and take them out; ours also
runs what is left, to see that it does what it should. One thread, taking turns; CPU seconds are
what counts on a shared machine. Without the peer (``pip install --no-deps
torch-pruning==1.6.1``) its columns stay empty.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from machine import describe
from ort_sessions import cpu_session, interleaved_latency
from resnet50 import images, resnet50
from table import replace
from torch import Tensor, nn

import amct_pytorch as amct
from amct_pytorch.flows import channel_pruning
from amct_pytorch.graph.costs import layer_macs
from amct_pytorch.graph.look import copy_model
from amct_pytorch.graph.tensors import ModelInputs
from amct_pytorch.graph.trace import trace_forward

RESULTS = Path(__file__).parent / "results" / "pruning.json"
README = Path(__file__).parent / "README.md"
CFG = """prune_config { filter_pruner { balanced_l2_norm_filter_prune {
    prune_ratio: 0.5 ascend_optimized: true } } }"""


def timed(call: Callable[[], nn.Module]) -> tuple[nn.Module, float]:
    """What `call` returns, and its CPU seconds."""
    began = time.process_time()
    result = call()
    return result, time.process_time() - began


def by_peer(model: nn.Module, x: Tensor) -> nn.Module:
    """Half the channels by Torch-Pruning, in place."""
    import torch_pruning

    torch_pruning.pruner.MagnitudePruner(
        model,
        x,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[model.fc],
    ).step()
    return model


def export(model: nn.Module, x: Tensor, file: Path) -> Path:
    torch.onnx.export(
        model, (x,), file, input_names=["x"], output_names=["y"], dynamo=True, verbose=False
    )
    return file


def measure(rounds: int) -> dict:
    """All figures of one run."""
    torch.set_num_threads(1)
    channel_pruning.ROUNDS = 0  # the latency in the ledger is no part of pruning
    model, x = resnet50(), images(1)
    with tempfile.TemporaryDirectory() as folder:
        cfg = Path(folder) / "half.cfg"
        cfg.write_text(CFG)
        seconds: dict[str, list[float]] = {"ours": [], "peer": [], "forward": []}
        pruned: dict[str, nn.Module] = {"float": model}
        for number in range(rounds + 1):
            record = Path(folder) / f"record{number}.txt"
            pruned["ours"], ours = timed(
                lambda record=record: amct.create_prune_retrain_model(model, x, cfg, record)
            )
            taken = {"ours": ours}
            own = copy.deepcopy(model)
            try:
                pruned["peer"], taken["peer"] = timed(lambda own=own: by_peer(own, x))
            except ImportError:
                pruned.pop("peer", None)
            with torch.no_grad():
                taken["forward"] = timed(lambda: model(x))[1]
            if number:  # the first warms up
                for name, value in taken.items():
                    seconds[name].append(value)
        files = {
            name: export(one, x, Path(folder) / f"{name}.onnx") for name, one in pruned.items()
        }
        sessions = {name: cpu_session(str(file)) for name, file in files.items()}
        times = interleaved_latency(sessions, x.numpy())
        searched = search(model, x, Path(folder))
        peer_from = "torch_pruning" in sys.modules
        return {
            "machine": describe(),
            "peer": sys.modules["torch_pruning"].__version__ if peer_from else None,
            "cpu_s": {name: min(values) for name, values in seconds.items() if values},
            # Of the same round each: what else runs on the machine slows both alike.
            "times_peer": statistics.median(
                mine / theirs for mine, theirs in zip(seconds["ours"], seconds["peer"], strict=True)
            )
            if seconds["peer"]
            else None,
            "search": searched,
            "parameters": {
                name: sum(p.numel() for p in one.parameters()) for name, one in pruned.items()
            },
            "macs": {name: macs(one, x) for name, one in pruned.items()},
            "onnxruntime_ms": {name: statistics.median(values) for name, values in times.items()},
            "speed_up": {
                name: statistics.median(a / b for a, b in zip(times["float"], values, strict=True))
                for name, values in times.items()
            },
        }


def search(model: nn.Module, x: Tensor, folder: Path) -> dict:
    """The search for channels on the same network: the ratio it is asked for and reaches."""
    target = torch.nn.functional.one_hot(torch.tensor([1]), 1000).float()
    found = {}
    for ratio, ascend in ((2.0, False), (2.0, True), (4.0, False)):
        text = f"compress_ratio: {ratio} ascend_optimized: {str(ascend).lower()}"
        (folder / "search.cfg").write_text(text)
        began = time.process_time()
        amct.auto_channel_prune_search(
            model, folder / "search.cfg", [x, target], folder / "found.cfg"
        )
        spent = time.process_time() - began
        ledger = json.loads((folder / "found_ledger.json").read_text())
        name = f"{ratio:g}" + (", multiples of 16" if ascend else "")
        found[name] = {"reached": ledger["compress_ratio"][1], "cpu_s": spent}
    return found


def macs(model: nn.Module, x: Tensor) -> int:
    return sum(layer_macs(trace_forward(copy_model(model), ModelInputs.of(x))).values())


def table(found: dict) -> str:
    """The figures as text for the README."""
    names = {
        "float": "whole network",
        "ours": "**amct_pytorch**",
        "peer": f"Torch-Pruning {found['peer']}",
    }
    lines = [
        "| half the channels | analysis and pruning, CPU s | parameters M | GMACs "
        "| ONNX Runtime ms | speed-up |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, title in names.items():
        if name not in found["parameters"]:
            continue
        seconds = found["cpu_s"].get(name)
        lines.append(
            f"| {title} | {'' if seconds is None else format(seconds, '.2f')} "
            f"| {found['parameters'][name] / 1e6:.2f} | {found['macs'][name] / 1e9:.2f} "
            f"| {found['onnxruntime_ms'][name]:.1f} | {found['speed_up'][name]:.2f} |"
        )
    ratio = found["times_peer"]
    beside = "" if ratio is None else f" Ours over theirs, round by round: {ratio:.2f} (median)."
    rows = [
        f"| {name} | {figures['reached']:.4f} | {figures['cpu_s']:.1f} |"
        for name, figures in found["search"].items()
    ]
    return (
        f"CPU: {found['machine']['cpu']}; one thread. One forward of the whole network took "
        f"{found['cpu_s']['forward']:.2f} CPU s in the same run.{beside}\n\n"
        + "\n".join(lines)
        + "\n\n| search, compress_ratio | reached | CPU s |\n| --- | --- | --- |\n"
        + "\n".join(rows)
    )


def main() -> None:
    """Measures, and rewrites the results and their table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    found = measure(parser.parse_args().rounds)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    replace(README, "pruning", table(found))
    print(table(found))


if __name__ == "__main__":
    main()
