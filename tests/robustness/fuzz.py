"""Many random inputs for every call that reads a file: python tests/robustness/fuzz.py NUMBER.

Prints how many were tried, how many were accepted, and each kind of failure once, with the input
that gave it under fuzz-failures/.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import os
import sys
import time
import traceback
from pathlib import Path

from fuzz_cases import CALLS, only_told, spoiled
from hypothesis import HealthCheck, Phase, given, seed, settings

SECONDS = 20


def run(name: str, number: int, first_seed: int, out: Path) -> int:
    """Tries `number` inputs on one call; returns how many kinds of failure there were."""
    tried = accepted = 0
    slowest = 0.0
    failures: dict[str, str] = {}

    @seed(first_seed)
    @settings(
        max_examples=number,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(spoiled(name))
    def one(data: bytes) -> None:
        nonlocal tried, accepted, slowest
        tried += 1
        began = time.process_time()
        faulthandler.dump_traceback_later(6 * SECONDS, exit=True)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                accepted += only_told(CALLS[name][1], data)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            ours = [
                f for f in traceback.extract_tb(error.__traceback__) if "amct_pytorch" in f.filename
            ]
            where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else frame.name
            key = f"{type(error).__name__} at {where}"
            if key not in failures:
                failures[key] = traceback.format_exc()
                (out / f"{name.replace(' ', '-')}-{len(failures)}").write_bytes(data)
        took = time.process_time() - began
        if took > SECONDS:
            failures.setdefault("slow", f"{took:.1f} s")
        slowest = max(slowest, took)

    one()
    faulthandler.cancel_dump_traceback_later()
    print(
        f"{name}: {tried} tried, {accepted} accepted, {len(failures)} kinds of failure, "
        f"slowest {slowest:.2f} s CPU",
        flush=True,
    )
    for key, text in failures.items():
        print(f"--- {key}\n{text[-1800:]}", flush=True)
    return len(failures)


def main() -> int:
    """Runs the calls named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("number", type=int, nargs="?", default=3400, help="inputs for each call")
    parser.add_argument("--call", choices=CALLS, action="append")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ["AMCT_LOG_LEVEL"] = "ERROR"
    out = Path("fuzz-failures").absolute()
    out.mkdir(exist_ok=True)
    kinds = [run(name, arguments.number, arguments.seed, out) for name in arguments.call or CALLS]
    return 1 if any(kinds) else 0


if __name__ == "__main__":
    sys.exit(main())
