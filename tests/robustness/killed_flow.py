"""Runs the post-training flow again and again, killed at each system call that changes a file.

A process of its own (see test_killed.py): it forks a child for every moment, the child kills itself
there with SIGKILL, half of a write done, and the parent looks at what is left and runs again.
Prints the number of moments there are in both rounds as JSON: in an empty folder, and over old
files. With a number as its argument only every so many-th moment is taken.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import onnx
import torch
from fuzz_cases import Small, X, wide

import amct_pytorch as amct
from amct_pytorch.errors import AmctError
from amct_pytorch.export import float_model
from amct_pytorch.record.record_file import read_record

CALLS = ("open", "write", "fsync", "replace", "rename", "unlink", "mkdir", "chmod")
MODELS = ("m.onnx", "out/net_deploy_model.onnx", "out/net_fake_quant_model.onnx")
SAME = ("config.json", "record.txt", *MODELS[1:], "info.json")


def network(value: float) -> Small:
    model = Small().eval()
    with torch.no_grad():
        model.fc.bias.fill_(value)
        model.conv.weight.mul_(1 + value)
    return model


def flow(model: Small) -> None:
    amct.create_quant_config("config.json", model, X)
    amct.quantize_model("config.json", "m.onnx", "record.txt", model, X)(X)
    amct.save_model("m.onnx", "record.txt", "out/net")
    amct.auto_decomposition(wide(), "info.json", rank_policy="flops")


def remember_export() -> None:
    """The export writes no file and takes most of the time: each model is exported once."""
    export, known = float_model.export_float, dict[float, onnx.ModelProto]()

    def remembered(model: Any, *args: Any, **kwargs: Any) -> onnx.ModelProto:
        key = float(
            model.fc.inner.bias.sum() if hasattr(model.fc, "inner") else model.fc.bias.sum()
        )
        if key not in known:
            known[key] = export(model, *args, **kwargs)
        return copy.deepcopy(known[key])

    float_model.export_float = remembered  # type: ignore[assignment]


def changes_files(name: str, args: tuple[Any, ...]) -> bool:
    return name != "open" or bool(args[1] & os.O_CREAT)


def kill_at(moment: int, seen: list[str]) -> None:
    """From now on the process dies at the call of this number; 0: never, only counts."""

    def guarded(name: str) -> Any:
        original = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if changes_files(name, args):
                seen.append(name)
                if len(seen) == moment:
                    if name == "write":
                        original(args[0], bytes(args[1])[: len(args[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, guarded(name))


def in_child(moment: int, model: Small) -> tuple[int, int]:
    """Exit status of a child that runs the flow, and how many moments it passed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            seen: list[str] = []
            write = os.write
            kill_at(moment, seen)
            flow(model)
            write(writer, str(len(seen)).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    counted = os.read(reader, 100)
    os.close(reader)
    return status, int(counted or 0)


def content() -> dict[str, bytes]:
    return {name: Path(name).read_bytes() for name in SAME if Path(name).exists()}


def check_whole(references: list[dict[str, bytes]]) -> None:
    """Each file is whole; what is not made in several steps is the old or the new version."""
    for name in MODELS:
        if Path(name).exists():
            assert onnx.load(name).graph.node, name
    for name in ("config.json", "info.json", "info_ledger.json", "out/net_ledger.json"):
        if Path(name).exists():
            json.loads(Path(name).read_text())
    if Path("record.txt").exists():
        assert len(read_record("record.txt").factors) == 3
    for name, data in content().items():
        if name != "record.txt":
            assert any(data == reference.get(name) for reference in references), name


def check_pairing(references: list[dict[str, bytes]]) -> bool:
    """Record and ONNX model are refused, or are of one run; returns whether they were taken."""
    try:
        amct.save_model("m.onnx", "record.txt", "tried/net")
    except AmctError:
        assert not Path("tried").exists()
        return False
    tried = Path("tried/net_deploy_model.onnx").read_bytes()
    record = Path("record.txt").read_bytes()
    pairs = [(r["out/net_deploy_model.onnx"], r["record.txt"]) for r in references]
    assert (tried, record) in pairs
    shutil.rmtree("tried")
    return True


def round_of_kills(
    model: Small, references: list[dict[str, bytes]], start: Path | None, stride: int
) -> int:
    moment = 1 - stride
    while True:
        moment += stride
        shutil.rmtree("work", ignore_errors=True)
        if start is None:
            Path("work").mkdir()
        else:
            shutil.copytree(start, "work")
        os.chdir("work")
        status, passed = in_child(moment, model)
        if status == 0:
            os.chdir("..")
            return passed
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, moment
        check_whole(references)
        check_pairing(references)
        again, _ = in_child(0, model)
        assert again == 0, f"the run after moment {moment} failed"
        assert content() == references[-1], f"the run after moment {moment} differs"
        assert not list(Path().rglob(".amct-*")), f"moment {moment} left a temporary file"
        os.chdir("..")


def main() -> None:
    os.environ["AMCT_LOG_LEVEL"] = "ERROR"
    remember_export()
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
    references = []
    models = network(0.25), network(-0.125)
    for number, model in enumerate(models):
        Path(f"reference{number}").mkdir()
        os.chdir(f"reference{number}")
        flow(model)
        references.append(content())
        assert len(references[-1]) == len(SAME)
        os.chdir("..")
    assert references[0]["record.txt"] != references[1]["record.txt"]
    stride = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    fresh = round_of_kills(models[1], references[1:], None, stride)
    over_old = round_of_kills(models[1], references, Path("reference0").absolute(), stride)
    print(json.dumps({"fresh": fresh, "over old files": over_old}), file=sys.__stdout__)


if __name__ == "__main__":
    main()
