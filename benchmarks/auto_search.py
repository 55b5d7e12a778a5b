"""The search for a config on EfficientNet-Lite0: trials, what one costs, and a kill in between.

    python benchmarks/auto_search.py

Metric: top-1 agreement with the float network on 192 crops of 12 photos that calibration never
saw; wanted is all of them, or what `--agreement` says. One process searches from start to end;
another is killed (SIGKILL) in the middle of its third trial and the search called again. Results
go to `results/auto_search.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import nn

import amct_pytorch as amct

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from auto_calibrate_cnn import Agreement

RESULTS = Path(__file__).parent / "results" / "auto_search.json"
STEM = "accuracy_based_auto_calibration"
KILLED_IN_TRIAL = 3


class Measured(Agreement):
    """Takes the CPU time of each evaluation; may end the process in one of them.

    Args:
        least: what is good enough.
        dies_in: number of the trial in which it kills its process; None: in none.
    """

    def __init__(self, least: float, dies_in: int | None) -> None:
        super().__init__(least)
        self.dies_in = dies_in
        self.cpu_seconds: list[float] = []

    def evaluate(self, model: nn.Module) -> float:
        """The agreement, as `Agreement` has it."""
        if len(self.cpu_seconds) == self.dies_in:  # the first evaluation is no trial
            os.kill(os.getpid(), signal.SIGKILL)
        began = time.process_time()
        found = super().evaluate(model)
        self.cpu_seconds.append(time.process_time() - began)
        return found


def search(folder: Path, least: float, dies_in: int | None = None) -> Measured:
    """One search with all its files in `folder`."""
    from real_models import efficientnet_lite0

    torch.set_num_threads(1)
    model, evaluator = efficientnet_lite0(), Measured(least, dies_in)
    config = folder / "config.json"
    amct.create_quant_config(config, model, evaluator.batches[0], batch_num=len(evaluator.batches))
    amct.accuracy_based_auto_calibration(
        model, evaluator, config, folder / "record.txt", folder / "lite0", evaluator.batches[0]
    )
    return evaluator


def read(folder: Path, what: str) -> Any:
    """One of the files of a search."""
    return json.loads((folder / f"{STEM}_{what}.json").read_text())


def measured(least: float) -> dict[str, Any]:
    """What both searches did."""
    with tempfile.TemporaryDirectory() as temporary:
        whole, killed = Path(temporary) / "whole", Path(temporary) / "killed"
        evaluator = search(whole, least)
        trials = read(whole, "record")["trials"]
        call = f"a.search(a.Path({str(killed)!r}), {least}, dies_in={KILLED_IN_TRIAL})"
        code = f"import auto_search as a; {call}"
        ended = subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parent)
        assert ended.returncode == -signal.SIGKILL, ended.returncode
        before = len(read(killed, "record")["trials"])
        again = search(killed, least)
        layers = sum(isinstance(layer, dict) for layer in read(whole, "final_config").values())
        same = read(whole, "final_config") == read(killed, "final_config")
        float_s, *trial_s = evaluator.cpu_seconds
        return {
            "wanted": least,
            "layers": layers,
            "trials": [[len(t["rolled_back"]), t["metric"], t["accepted"]] for t in trials],
            "most_trials": math.log2(layers) + 2,
            "float_evaluation_cpu_s": float_s,
            "trial_of_an_evaluation": [seconds / float_s for seconds in trial_s],
            "killed": {
                "trials_before": before,
                "trials_after": len(again.cpu_seconds) - 1,
                "same_final_config": same,
                "same_record": read(killed, "record")["trials"] == trials,
            },
        }


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--agreement", type=float, default=1.0)
    found = measured(parser.parse_args().agreement)
    text = json.dumps(found, indent=1)
    print(text)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(text + "\n")


if __name__ == "__main__":
    main()
